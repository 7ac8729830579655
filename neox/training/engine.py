"""What the training loop sees of DeepSpeed: one step, one evaluation, and the state of every parameter."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neox.checkpoint.native.lineage import Lineage
from neox.config import Config, deepspeed_dict
from neox.model.experts import Experts
from neox.parallel.mesh import Mesh
from neox.training.batches import GlobalBatch
from neox.training.deepspeed_updates import mend_updates
from neox.training.objectives.objective import Figures, NextToken, Objective
from neox.training.optimizers.build import build_optimizer


class Engine(ABC):
    """A model ready to train on this rank.

    Attributes:
        config, mesh: what was asked for, and where this process stands.
        deepspeed: the DeepSpeed engine underneath.
        objective: what is minimised.
        figures: what it measured beside the loss in the last step or evaluation, means over all ranks.
        lineage: the run, as its checkpoints name it.
    """

    config: Config
    mesh: Mesh
    deepspeed: Any
    objective: Objective = NextToken()
    figures: Figures = MappingProxyType({})
    lineage: Lineage = Lineage()
    watchers: tuple[Callable[[], None], ...] = ()

    @abstractmethod
    def train_step(self, batch: GlobalBatch) -> torch.Tensor:
        """Forward, backward and update over all micro-batches; return the mean loss, fp32 scalar on the device."""

    def evaluate(self, batch: GlobalBatch) -> torch.Tensor:
        """Mean loss over all micro-batches of all ranks without an update, fp32 scalar on the device."""
        from neox.training.metrics.timers import untimed

        with untimed(self.deepspeed):
            return self._evaluate(batch)

    @abstractmethod
    def _evaluate(self, batch: GlobalBatch) -> torch.Tensor:
        """What `evaluate` gives."""

    @abstractmethod
    def loss_before_update(self) -> torch.Tensor | None:
        """Mean loss of this rank's micro-batches, when all gradients of a step are there; None where it is not known.

        Where several ranks know it, the loss of the step is the mean of theirs.
        """

    def accumulate(self, micro_batches: int) -> None:
        """Make the next update out of this many micro-batches."""
        engine = self.deepspeed
        if micro_batches != engine.gradient_accumulation_steps():
            engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * self.mesh.data_size)
            engine.micro_steps = 0  # DeepSpeed updates where this is a multiple of the number of micro-batches
        scale = (self.loss_scale or 1.0) / micro_batches
        for module in engine.module.modules():
            if isinstance(module, Experts):
                module.loss_scale = scale

    def watch_gradients(self, watcher: Callable[[], None]) -> None:
        """Call `watcher` in every step, when its gradients are complete and neither clipped nor used."""
        self.watchers = (*self.watchers, watcher)

    def gradients_complete(self) -> None:
        """Tell those who watch."""
        for watcher in self.watchers:
            watcher()

    def set_learning_rate(self, learning_rate: float, betas: tuple[float, float] | None = None) -> None:
        """Use this rate, and where given these betas, in the next update."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
            if betas is not None:
                group["betas"] = betas

    @property
    def gradient_norm(self) -> torch.Tensor | float | None:
        """L2 norm of the whole gradient before clipping, of the last step."""
        return self.deepspeed.get_global_grad_norm()

    @property
    def skipped_last_step(self) -> bool:
        """Whether the last update was left out: its gradients were not finite, or a guard said so."""
        return bool(getattr(self.deepspeed.optimizer, "overflow", False))

    @property
    def loss_scale(self) -> float | None:
        """The loss scale of fp16; None in other precisions."""
        return float(self.deepspeed.optimizer.loss_scale) if self.config.model.precision == "fp16" else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by canonical name, in a fixed order."""
        return named_by_canon(self.deepspeed.module)


def named_by_canon(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a built module under the canonical names written on them."""
    return {p.canonical_name: p for p in module.parameters()}  # type: ignore[attr-defined]


def start_deepspeed(model: nn.Module, config: Config, mesh: Mesh, **changes: Any) -> Any:
    """Wrap `model` in a DeepSpeed engine with our optimizer.

    Args:
        model: a Decoder or a PipelineModule on this rank's device.
        config: the run.
        mesh: the process grid.
        changes: entries of DeepSpeed's dict that differ from the derived ones.
    """
    import deepspeed

    from neox.training.metrics.timers import console_settings, install_timers

    join_deepspeed()
    optimizer = build_optimizer(named_by_canon(model).items(), config, mesh)
    is_pipeline = isinstance(model, deepspeed.pipe.PipelineModule)
    settings = deepspeed_dict(config) | console_settings(config) | changes
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=settings,
        mpu=mesh if mesh.tensor_size > 1 and not is_pipeline else None,
        dist_init_required=False,
    )
    install_timers(engine, config)
    mend_updates(engine.optimizer, has_loss_scale=config.model.precision == "fp16")
    return engine


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group that is already there; call before anything of it is built.

    It is told to print warnings only, and that its CPU collective cannot be had: that is an extension it would
    compile at start, and gloo does the work. The list is made here, as DeepSpeed would try compilers to make it.
    """
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(dist_init_required=False)


def mean_over_data(loss: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Average of a scalar over the data-parallel ranks."""
    if mesh.data_size > 1:
        dist.all_reduce(loss, group=mesh.data_group)
        loss /= mesh.data_size
    return loss
