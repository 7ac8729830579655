"""Naming the ranks that hold up the others.

All ranks of a step end it together, so a slow one shows only in the time that each needs for itself: the time of a step
less the time in collectives, where it waits for others. On a CPU that is what the clock says between the functions that
are called. On a GPU the host only queues work, so events are put into the stream before and after each collective, in
the last step before every `log_interval` and no other; there it is time of the step's own stream. Waits for
communication on further streams (ZeRO's overlap, prefetching at ZeRO 3) count as the rank's own time, which makes
ranks look more alike than they are.
"""

import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed as dist

from neox.checkpoint.native.manifest import Progress
from neox.parallel.collectives import observe_collectives, own_record, seconds_waited
from neox.parallel.mesh import Mesh
from neox.training.engine import Engine
from neox.training.loop import Callback, Step
from neox.training.metrics.loggers import MetricLog
from neox.training.team import tell


class OwnTime(Protocol):
    """Measures what this rank needs for itself."""

    def forget(self) -> None:
        """What was measured so far does not count, nor does the step that begins now."""

    def start(self, *, is_sampled: bool) -> None:
        """A step begins; the last one before a report is sampled."""

    def stop(self) -> None:
        """It has ended."""

    def seconds(self) -> float | None:
        """A step's own time since the last call; None where no step was measured."""


class HostTime:
    """By the host's clock, in every step."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """See OwnTime."""
        self._since: float | None = None
        self._waited = self._own = 0.0
        self._steps = 0

    def start(self, *, is_sampled: bool) -> None:
        """See OwnTime."""
        self._since, self._waited = time.perf_counter(), seconds_waited()

    def stop(self) -> None:
        """See OwnTime."""
        if self._since is not None:
            self._own += time.perf_counter() - self._since - (seconds_waited() - self._waited)
            self._steps += 1

    def seconds(self) -> float | None:
        """See OwnTime."""
        mean = self._own / self._steps if self._steps else None
        self._own, self._steps = 0.0, 0
        return mean


class DeviceTime:
    """By events in the stream of the device, in sampled steps."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._step: list[Any] = []
        self._collectives: list[Any] = []

    def forget(self) -> None:
        """See OwnTime."""
        self._step = []

    def start(self, *, is_sampled: bool) -> None:
        """See OwnTime."""
        if is_sampled:
            self._collectives = []
            self._step = [self._event()]
            observe_collectives(self._mark)

    def stop(self) -> None:
        """See OwnTime."""
        if len(self._step) == 1:
            observe_collectives(None)
            self._step.append(self._event())

    def seconds(self) -> float | None:
        """See OwnTime; waits for the device."""
        if len(self._step) < 2:
            return None
        self._step[1].synchronize()
        marks = iter(self._collectives)
        waited = sum(begin.elapsed_time(end) for begin, end in zip(marks, marks, strict=False))
        return (self._step[0].elapsed_time(self._step[1]) - waited) / 1000.0

    def _mark(self) -> None:
        """A collective begins or ends on this thread."""
        if own_record().is_of_step and torch.cuda.current_stream(self._stream.device) == self._stream:
            self._collectives.append(self._event())

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event


@dataclass(frozen=True)
class Straggler:
    """A rank that is slow.

    Attributes:
        rank: which.
        seconds: its own time.
        usual: median of the other ranks of its pipeline stage.
    """

    rank: int
    seconds: float
    usual: float

    @property
    def factor(self) -> float:
        """How many times slower than usual it is."""
        return self.seconds / max(self.usual, 1e-9)


def compared(seconds: Sequence[float], mesh: Mesh) -> list[Straggler]:
    """Every rank with what is usual among the others of its pipeline stage, the slowest first.

    Stages do unequal work, so they are not compared with each other.

    Args:
        seconds: of each rank.
        mesh: for the sizes of the axes.
    """
    stage = [mesh.coordinates(rank)[0] for rank in range(len(seconds))]
    found = []
    for rank, own in enumerate(seconds):
        others = [s for other, s in enumerate(seconds) if other != rank and stage[other] == stage[rank]]
        if others:
            found.append(Straggler(rank, own, median(others)))
    return sorted(found, key=lambda one: -one.factor)


class Stragglers:
    """Stops the clock after every step, and compares the ranks at every `log_interval`."""

    def __init__(self, engine: Engine, log: MetricLog, *, factor: float, clock: OwnTime) -> None:
        self.mesh = engine.mesh
        self.log = log
        self.interval = engine.config.logging.log_interval
        self.factor = factor
        self.clock = clock
        self._hosts: list[str] = []
        self._looks = 0
        self._times: Counter[int] = Counter()

    def before_training(self, progress: Progress) -> None:
        """Learn the hosts' names."""
        if not self._hosts:
            self._hosts = [""] * self.mesh.world_size
            dist.all_gather_object(self._hosts, socket.gethostname())

    def after_step(self, step: Step) -> None:
        """Compare when due."""
        self.clock.stop()
        iteration = step.progress.iteration
        if iteration % self.interval:
            return
        seconds = self.clock.seconds()
        if seconds is None:  # on all ranks
            return
        own = torch.tensor([seconds], dtype=torch.float64, device=self.mesh.device)
        everyone = [torch.empty_like(own) for _ in range(self.mesh.world_size)]
        dist.all_gather(everyone, own)
        ranks = compared([float(seconds) for seconds in everyone], self.mesh)
        self._looks += 1
        for straggler in ranks:
            if straggler.factor > self.factor:
                self._times[straggler.rank] += 1
                tell(self.mesh, f"iteration {iteration}: {self._line(straggler)}")
        if ranks:
            worst = {"train/slowest_rank": ranks[0].rank, "train/slowest_rank_factor": ranks[0].factor}
            self.log.log(iteration, worst)

    def _line(self, slow: Straggler) -> str:
        among = f"stage {self.mesh.coordinates(slow.rank)[0]}" if self.mesh.pipe_size > 1 else "all"
        often = f"; slow at {self._times[slow.rank]} of {self._looks} looks" if self._looks > 1 else ""
        return (
            f"rank {slow.rank} (on {self._hosts[slow.rank]}) is slow: {slow.seconds:.3f} s of its own a step, "
            f"{slow.factor:.1f} times the {slow.usual:.3f} s that are usual among {among}{often}"
        )


class _Restart:
    """Starts the clock when everything beside the step is done."""

    def __init__(self, clock: OwnTime, interval: int) -> None:
        self.clock = clock
        self.interval = interval

    def before_training(self, progress: Progress) -> None:
        """The first step begins, in which kernels are compiled and loaders started: it says nothing of a rank."""
        self.clock.forget()

    def after_step(self, step: Step) -> None:
        """The next step begins."""
        self.clock.start(is_sampled=(step.progress.iteration + 1) % self.interval == 0)


def naming_stragglers(engine: Engine, log: MetricLog, callbacks: Sequence[Callback]) -> Iterator[Callback]:
    """The callbacks of a run, and around them what times the steps between, where `straggler_factor` is set."""
    factor, device = engine.config.reliability.straggler_factor, engine.mesh.device
    if factor is None:
        yield from callbacks
        return
    clock: OwnTime = DeviceTime(device) if device.type == "cuda" else HostTime()
    stragglers = Stragglers(engine, log, factor=factor, clock=clock)
    yield stragglers
    yield from callbacks
    yield _Restart(clock, stragglers.interval)
