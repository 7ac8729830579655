"""The training loop: forward, backward, step; everything else is a callback."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from neox.checkpoint.native.manifest import Progress
from neox.data.order import advance
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
        skipped: whether the update was left out, by fp16 overflow or a guard.
        samples: sequences it trained on, over all data-parallel ranks.
        length: tokens of each.
        tokens: those that its loss is a mean over (see `GlobalBatch`), fp32 scalar on the device; 0 where none of them
            is labelled, and then the loss, 0, says nothing.
        is_last: whether this process ends after it.
        figures: what the objective measured beside the loss, by name.
    """

    progress: Progress
    loss: torch.Tensor
    learning_rate: float
    gradient_norm: torch.Tensor | float | None
    skipped: bool
    samples: int
    length: int
    tokens: torch.Tensor
    is_last: bool = False
    figures: Figures = field(default_factory=dict)


class Callback(Protocol):
    """Something that happens beside training. Every rank calls it at the same points."""

    def before_training(self, progress: Progress) -> None:
        """Once, before the first step of this process."""

    def after_step(self, step: Step) -> None:
        """After every step."""


class Ending(Protocol):
    """What may end a run before its last iteration."""

    def is_due(self, progress: Progress) -> bool:
        """Whether to end at `progress`; the same on all ranks, which all ask before the first step and after each."""


class Endless:
    """Nothing ends the run before its last iteration."""

    def is_due(self, progress: Progress) -> bool:
        """Never."""
        return False


class Memory(Protocol):
    """What a run remembers of its steps beside how many there were."""

    def remember(self, before: Progress, after: Progress, tokens: torch.Tensor) -> Progress:
        """Add to `after`, where the run stands after a step from `before`, what that step brought.

        Args:
            before: where the run stood.
            after: where it stands.
            tokens: see `Step`.
        """


class Forgetful:
    """Nothing is remembered."""

    def remember(self, before: Progress, after: Progress, tokens: torch.Tensor) -> Progress:
        """See Memory."""
        return after


class Rewind(Exception):
    """Go back to the newest checkpoint; raised on all ranks by a callback, after the same step.

    Attributes:
        reason: what was found, for the log.
        left_out: samples of the run's order, [start, end), that are not to be trained on when it comes there again;
            None to repeat everything.
    """

    def __init__(self, reason: str, left_out: tuple[int, int] | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.left_out = left_out


@dataclass(frozen=True)
class Run:
    """What a training loop works with.

    Attributes:
        engine: the model and its optimizer.
        loader: micro-batches from the first one not yet consumed.
        batches: makes a step's batch of them.
        schedule: learning rates.
        iterations: where to stop.
        ending: what may stop it before that.
        memory: what goes into checkpoints beside.
    """

    engine: Engine
    loader: Iterator[Mapping[str, torch.Tensor]]
    batches: BatchMaker
    schedule: LRSchedule
    iterations: int
    ending: Ending = field(default_factory=Endless)
    memory: Memory = field(default_factory=Forgetful)


def training_loop(run: Run, progress: Progress, callbacks: Sequence[Callback]) -> Progress:
    """Train until `run.iterations`, or until the run is asked to end; return where it stands then.

    Raises:
        Rewind: from a callback.
    """
    for callback in callbacks:
        callback.before_training(progress)
    is_last = run.ending.is_due(progress) or progress.iteration >= run.iterations
    while not is_last:
        batch = run.batches.for_step(run.loader, progress)
        learning_rate = run.schedule.lr_at(progress.schedule_step)
        run.engine.set_learning_rate(learning_rate, run.schedule.betas_at(progress.schedule_step))
        loss = run.engine.train_step(batch)
        skipped = run.engine.skipped_last_step
        after = replace(
            progress,
            iteration=progress.iteration + 1,
            consumed_samples=advance(progress.consumed_samples, batch.samples, progress.left_out),
            schedule_step=progress.schedule_step + (not skipped),
        )
        progress = run.memory.remember(progress, after, batch.token_count)
        is_last = run.ending.is_due(progress) or progress.iteration >= run.iterations
        step = Step(
            progress,
            loss,
            learning_rate,
            run.engine.gradient_norm,
            skipped,
            samples=batch.samples,
            length=batch.length,
            tokens=batch.token_count,
            is_last=is_last,
            figures=run.engine.figures,
        )
        for callback in callbacks:
            callback.after_step(step)
    return progress
