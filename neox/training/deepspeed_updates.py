"""What DeepSpeed's optimizers get wrong around an update, done right."""

from typing import Any


def mend_updates(optimizer: Any, *, has_loss_scale: bool) -> None:
    """Make whole updates of whole gradients, from now on.

    Args:
        optimizer: DeepSpeed's, or torch's at ZeRO 0, which needs nothing.
        has_loss_scale: whether the run is in fp16.
    """
    if has_loss_scale:
        _grow_after_updates(optimizer)
    if hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
        _forget_what_was_left_out(optimizer)


def _grow_after_updates(optimizer: Any) -> None:
    """Let the loss scale grow once an update is made, not in the midst of it.

    DeepSpeed raises the scale between computing the gradients and dividing them by it, so that the update at which it
    grows is made of half the gradient (and the norm of half of it, at ZeRO 3).
    """
    change_scale, update = optimizer._update_scale, optimizer.step

    def shrink(has_overflow: bool = False) -> None:
        if has_overflow:  # what is left of the step is to let go of its gradients
            change_scale(True)

    def update_and_grow(*args: Any, **options: Any) -> None:
        update(*args, **options)
        if not optimizer.overflow:
            change_scale(False)

    optimizer._update_scale, optimizer.step = shrink, update_and_grow


def _forget_what_was_left_out(optimizer: Any) -> None:
    """Have the step after an update that was left out begin with no gradients.

    With `offload_optimizer` and gradients accumulated in fp32, DeepSpeed's ZeRO 1 and 2 add to those that overflowed,
    which then never end.
    """
    update = optimizer.step

    def update_or_forget(*args: Any, **options: Any) -> None:
        update(*args, **options)
        if optimizer.overflow:
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    optimizer.step = update_or_forget
