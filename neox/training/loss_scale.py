"""When DeepSpeed's loss scale of fp16 grows."""

from typing import Any


def grow_after_updates(optimizer: Any) -> None:
    """Let the loss scale grow once an update is made, not in the midst of it.

    DeepSpeed's optimizers raise the scale between computing the gradients and dividing them by it, so that the update
    at which it grows is made of half the gradient (and of the norm, at ZeRO 0 and 3).

    Args:
        optimizer: DeepSpeed's, of an fp16 run.
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
