"""Leaving out an update of the weights that has been computed, with the same decision on all ranks.

DeepSpeed calls its optimizer where all gradients of a step are there, at every ZeRO stage and under a pipeline; the
call is taken in here. What leaves an update out is DeepSpeed's own way with fp16 gradients that overflow, without the
loss scale and its counters.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from neox.training.engine import Engine

Decision = Callable[[float, float], bool]
"""Gets the mean loss of a step and the norm of its gradient before clipping; tells whether to leave its update out."""

_HIDDEN = object()


def guard_updates(engine: Engine, leaves_out: Decision) -> None:
    """Ask before every update from now on; every step then waits for the device once.

    Args:
        engine: ready to train.
        leaves_out: gets the same numbers on all ranks.
    """
    optimizer = engine.deepspeed.optimizer
    update = optimizer.step

    def ask_and_update(*args: Any, **options: Any) -> None:
        with norm_before_update(engine) as norm:
            loss, norm_seen = agreed(engine, engine.loss_before_update(), norm)
            if leaves_out(loss, norm_seen):
                leave_out(optimizer, update)
                optimizer._global_grad_norm = norm
            else:
                optimizer.overflow = False  # torch's own has no such thing, so nothing else would reset it
                update(*args, **options)

    optimizer.step = ask_and_update


def agreed(engine: Engine, loss: torch.Tensor | None, norm: torch.Tensor) -> tuple[float, float]:
    """Mean loss of the ranks that know it, and the norm, the same numbers on all ranks; waits for the device.

    Args:
        engine: whose ranks these are.
        loss: of this rank's micro-batches; None on pipeline stages before the last.
        norm: of the whole gradient, up to roundings the same everywhere.
    """
    known = loss is not None
    loss = torch.zeros_like(norm) if loss is None else loss
    figures = torch.stack((loss.double(), torch.full_like(norm, float(known)).double(), norm.double()))
    if engine.mesh.world_size > 1:
        dist.all_reduce(figures)
    total, count, norms = figures.tolist()
    return total / count, norms / engine.mesh.world_size


@contextmanager
def norm_before_update(engine: Engine) -> Iterator[torch.Tensor]:
    """The norm of the whole gradient before clipping, infinite where it is not finite; a collective.

    Inside the context DeepSpeed's optimizers take what was computed here, and do not compute it again (but for that of
    bf16 pipelines, which has no place for it).
    """
    optimizer = engine.deepspeed.optimizer
    if not hasattr(optimizer, "clip_grad"):  # torch's own: ZeRO 0, where the engine knows it
        yield torch.as_tensor(engine.gradient_norm, dtype=torch.float32, device=engine.mesh.device)
        return
    from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

    if hasattr(optimizer, "scaled_global_norm"):  # ZeRO 1 and 2
        optimizer._wait_for_offload_copies()
        scaled = optimizer.scaled_global_norm()
        taken: dict[str, Any] = {"scaled_global_norm": lambda: scaled}
    elif hasattr(optimizer, "_get_norm_groups"):  # ZeRO 3
        groups = optimizer._get_norm_groups()
        scaled = combine_grad_norm_groups(groups)
        taken = {"_get_norm_groups": lambda: groups}
    else:
        gradients = optimizer.get_grads_for_norm()[0]
        scaled = get_global_norm_of_tensors(gradients, mpu=optimizer.mpu, norm_type=optimizer.norm_type)
        taken = {}
    norm = torch.as_tensor(scaled, dtype=torch.float32, device=engine.mesh.device) / (engine.loss_scale or 1.0)
    with replaced(optimizer, **taken):
        yield torch.where(norm.isfinite() & (norm >= 0.0), norm, torch.inf)


def leave_out(optimizer: Any, update: Callable[[], Any]) -> None:
    """Let go of the gradients as if they had overflowed; weights, moments and loss scale stay.

    Args:
        optimizer: DeepSpeed's, or torch's at ZeRO 0, whose gradients the engine clears itself.
        update: its step.
    """
    overflow = partial(setattr, optimizer, "overflow", True)
    finding: dict[str, Any]
    if hasattr(optimizer, "scaled_global_norm"):
        finding = {"check_grad_overflow": True, "check_overflow": lambda **_: overflow()}
    elif hasattr(optimizer, "_get_norm_groups"):
        finding = {"_overflow_check_and_loss_scale_update": lambda **_: overflow()}
    else:
        overflow()
        if hasattr(optimizer, "clear_hp_grads"):  # that of bf16 pipelines
            optimizer.clear_hp_grads()
            optimizer.clear_lp_grads()
        return
    with replaced(optimizer, _update_scale=lambda *_: None, **finding):
        update()


@contextmanager
def replaced(thing: Any, **attributes: Any) -> Iterator[None]:
    """Give an object other attributes for a while; those of its class show again afterwards."""
    own = {name: vars(thing).get(name, _HIDDEN) for name in attributes}
    vars(thing).update(attributes)
    try:
        yield
    finally:
        for name, value in own.items():
            if value is _HIDDEN:
                delattr(thing, name)
            else:
                setattr(thing, name, value)
