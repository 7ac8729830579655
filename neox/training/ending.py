"""The end of a run before its last iteration: by a signal, a stop file, a time limit or `exit_interval`.

All ranks end after the same step, though what asks for it may reach one of them only: after each step all ranks vote,
and hear the result one step later, when it is there.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
import torch.distributed as dist

from neox.checkpoint.native.manifest import Progress
from neox.config import Config
from neox.launch.clock import started
from neox.parallel.mesh import Mesh
from neox.parallel.rendezvous import GROUP_TIMEOUT
from neox.training.loop import Step
from neox.training.signals import Signals
from neox.training.team import tell

STOP_FILE = "STOP"
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_TO_LEAVE = 5.0
_UNKNOWN_SAVE = 120.0
"""Seconds kept free before the first save has told how long one takes; of a short time limit, a tenth."""


class Reason(IntEnum):
    """What may ask a run to end; of several the largest is told, so a user's wish before a scheduler's."""

    NONE = 0
    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGTERM = 3
    SIGHUP = 4
    STOP_FILE = 5
    SIGINT = 6

    @property
    def is_requeued(self) -> bool:
        """Whether a scheduler asked, which may start the run again by `requeue_status`."""
        return Reason.NONE < self < Reason.STOP_FILE


@dataclass(frozen=True)
class Outcome:
    """How a run in this process ended.

    Attributes:
        progress: where it stands.
        status: exit status of the process.
    """

    progress: Progress
    status: int = 0


class Vote:
    """The largest number that any rank has given, known to all without a wait.

    It goes over a process group of its own on the CPU, so no kernel waits for it, nor it for one.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Make the group; a collective."""
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT) if mesh.world_size > 1 else None
        self._number = torch.zeros((), dtype=torch.int32)
        self._work: dist.Work | None = None

    def begin(self, number: int) -> None:
        """Give this rank's number; returns at once."""
        self._number = torch.tensor(number, dtype=torch.int32)
        if self._group is not None:
            self._work = dist.all_reduce(self._number, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def result(self) -> int:
        """The largest number of the vote that was begun last; waits for ranks that have not begun it."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return int(self._number)


class EarlyEnd:
    """Ends a run when it is asked to, on all ranks alike; and a callback, the last one, that measures its steps."""

    def __init__(
        self, config: Config, mesh: Mesh, signals: Signals, *, seconds_to_save: Callable[[], float | None]
    ) -> None:
        """Make the group that votes; a collective.

        Args:
            config: the run.
            mesh: this rank's place.
            signals: what has come so far.
            seconds_to_save: seconds that a checkpoint takes; None before there was one.
        """
        self.config = config
        self.mesh = mesh
        self.signals = signals
        self.stop_file = stop_file(config)
        self.reason = Reason.NONE
        limit = config.reliability.time_limit
        self.deadline = None if limit is None else started(os.environ) + limit
        self.pace = Pace(seconds_to_save, unknown_save=min(_UNKNOWN_SAVE, (limit or 0.0) / 10))
        self._vote = Vote(mesh)
        self._is_voting = False
        self._looked = float("-inf")

    def is_due(self, progress: Progress) -> bool:
        """Whether to end here: what any rank knew when it was last asked, or now before the first step."""
        self.pace.step_done()
        if not self._is_voting:
            self._vote.begin(self._own_reason())
            self._is_voting = True
        self.reason = max(self.reason, Reason(self._vote.result()))
        self._vote.begin(self._own_reason())
        return self.reason > Reason.NONE

    def before_training(self, progress: Progress) -> None:
        """Start the clock."""
        self.pace.begin()

    def after_step(self, step: Step) -> None:
        """Take note that everything about a step is done."""
        self.pace.callbacks_done()

    def conclude(self, progress: Progress) -> int:
        """Tell what ended the run, and where it goes on; return the exit status of the process.

        All ranks come here before any goes on, so no launcher ends one that is still at work.
        """
        if self._is_voting:
            self._vote.result()
            self._vote.begin(0)
            self._vote.result()
        end = self.config.training.train_iters
        assert end is not None, "train_iters was resolved"
        if self.reason is Reason.STOP_FILE:
            self._remove_stop_file()
        if progress.iteration >= end:
            return 0
        tell(self.mesh, self._line(progress, end))
        status = self.config.reliability.requeue_status if self.reason.is_requeued else 0
        self.signals.are_answered = status != 0
        return status

    def _own_reason(self) -> Reason:
        """What this rank knows; the clock and the stop file are looked at by the first one alone."""
        found = [Reason[signum.name] for signum in self.signals.received]
        if self.mesh.rank == 0:
            found += [Reason.TIME_LIMIT] if self._is_late() else []
            found += [Reason.STOP_FILE] if self._is_stopped() else []
        return max(found, default=Reason.NONE)

    def _is_late(self) -> bool:
        return self.deadline is not None and time.time() + self.pace.seconds_to_end() > self.deadline

    def _is_stopped(self) -> bool:
        now = time.monotonic()
        if self.stop_file is None or now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return False
        self._looked = now
        return self.stop_file.exists()

    def _remove_stop_file(self) -> None:
        assert self.stop_file is not None, "it was found"
        if self.mesh.rank == 0:
            try:
                self.stop_file.unlink(missing_ok=True)
            except OSError as error:
                tell(self.mesh, f"{self.stop_file}: {error.strerror}; remove it, or the next run ends at once")

    def _line(self, progress: Progress, end: int) -> str:
        """What asked for the end, where the run stands, where its checkpoint lies, how it goes on."""
        asked = self.reason.name if self.reason else "exit_interval"
        if self.reason is Reason.STOP_FILE:
            asked = f"stop_file {self.stop_file}"
        elif self.reason is Reason.TIME_LIMIT:
            asked = f"time_limit {self.config.reliability.time_limit:g} s"
        where = f"iteration {progress.iteration} of {end}"
        if not self.pace.steps:
            return f"{asked}: ended before the first step, at {where}; nothing new to save"
        save = self.config.checkpoint.save
        if save is None:
            return f"{asked}: ended after {where}; nothing is saved, for save is not set"
        saved = Path(save) / f"global_step{progress.iteration}"
        if not saved.is_dir():  # a rewind has led back to where the run started
            return f"{asked}: ended at {where}, where the run went back to; nothing new to save"
        return f"{asked}: ended after {where}; saved in {saved}; {_way_on(self.config)}"


class Pace:
    """How long the parts of a step take, at most so far."""

    def __init__(self, seconds_to_save: Callable[[], float | None], *, unknown_save: float) -> None:
        self.seconds_to_save = seconds_to_save
        self.unknown_save = unknown_save
        self.steps = 0
        self.step_seconds = 0.0
        self.callback_seconds = 0.0
        self._since = time.monotonic()

    def begin(self) -> None:
        """The loop begins."""
        self._since = time.monotonic()

    def step_done(self) -> None:
        """Batch, forward, backward and update are done."""
        seconds = self._lap()
        if self.steps:  # not the first, in which kernels are compiled
            self.step_seconds = max(self.step_seconds, seconds)

    def callbacks_done(self) -> None:
        """Evaluation, saving and the rest are done."""
        self.steps += 1
        self.callback_seconds = max(self.callback_seconds, self._lap())

    def seconds_to_end(self) -> float:
        """Time that ending takes at worst, if it is asked for now.

        Two more steps, as the result of a vote comes one step late, what is done after each of them, and a save.
        """
        save = self.seconds_to_save()
        save = self.unknown_save if save is None else save
        return 2 * (self.step_seconds + self.callback_seconds) + save + _SECONDS_TO_LEAVE

    def _lap(self) -> float:
        before, self._since = self._since, time.monotonic()
        return self._since - before


def stop_file(config: Config) -> Path | None:
    """The file that ends a run; None if there is no place for it."""
    if config.reliability.stop_file is not None:
        return Path(config.reliability.stop_file)
    return Path(config.checkpoint.save) / STOP_FILE if config.checkpoint.save is not None else None


def _way_on(config: Config) -> str:
    """How the run is taken up again."""
    settings = config.checkpoint
    assert settings.save is not None, "it was saved"
    same_folder = settings.load is not None and Path(settings.load).resolve() == Path(settings.save).resolve()
    if config.reliability.auto_resume or (same_folder and not settings.finetune):
        return "the same command goes on from there"
    return f"load={settings.save}{' finetune=false' if settings.finetune else ''} goes on from there"
