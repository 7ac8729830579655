"""The training loop: forward, backward, step; everything else is a callback."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from neox.checkpoint.native.manifest import Progress
from neox.training.batches import BatchMaker
from neox.training.engine import Engine
from neox.training.objectives.objective import Figures
from neox.training.schedule import LRSchedule


@dataclass(frozen=True)
class Step:
    """What one iteration did.

    Attributes:
        progress: the run after it.
        loss: mean loss of the step, fp32 scalar on the device: reading it waits for the device.
        learning_rate: rate the update used.
        gradient_norm: L2 norm before clipping, where the engine has it.
        skipped: whether fp16 overflow dropped the update.
        samples: sequences it trained on, over all data-parallel ranks.
        length: tokens of each.
        figures: what the objective measured beside the loss, by name.
    """

    progress: Progress
    loss: torch.Tensor
    learning_rate: float
    gradient_norm: torch.Tensor | float | None
    skipped: bool
    samples: int
    length: int
    figures: Figures = field(default_factory=dict)


class Callback(Protocol):
    """Something that happens beside training. Every rank calls it at the same points."""

    def before_training(self, progress: Progress) -> None:
        """Once, before the first step of this process."""

    def after_step(self, step: Step) -> None:
        """After every step."""


@dataclass(frozen=True)
class Run:
    """What a training loop works with.

    Attributes:
        engine: the model and its optimizer.
        loader: micro-batches from the first one not yet consumed.
        batches: makes a step's batch of them.
        schedule: learning rates.
        iterations: where to stop.
    """

    engine: Engine
    loader: Iterator[Mapping[str, torch.Tensor]]
    batches: BatchMaker
    schedule: LRSchedule
    iterations: int


def training_loop(run: Run, progress: Progress, callbacks: Sequence[Callback]) -> Progress:
    """Train until `run.iterations` and return where the run stands then."""
    for callback in callbacks:
        callback.before_training(progress)
    while progress.iteration < run.iterations:
        batch = run.batches.for_step(run.loader, progress)
        learning_rate = run.schedule.lr_at(progress.schedule_step)
        run.engine.set_learning_rate(learning_rate, run.schedule.betas_at(progress.schedule_step))
        loss = run.engine.train_step(batch)
        skipped = run.engine.skipped_last_step
        progress = replace(
            progress,
            iteration=progress.iteration + 1,
            consumed_samples=progress.consumed_samples + batch.samples,
            schedule_step=progress.schedule_step + (not skipped),
        )
        step = Step(
            progress,
            loss,
            learning_rate,
            run.engine.gradient_norm,
            skipped,
            samples=batch.samples,
            length=batch.length,
            figures=run.engine.figures,
        )
        for callback in callbacks:
            callback.after_step(step)
    return progress
