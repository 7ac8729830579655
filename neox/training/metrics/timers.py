"""What DeepSpeed prints and times by itself, and what of it a run wants."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.utils.timer import NoopTimer, SynchronizedWallClockTimer

from neox.config import Config

NAMES = {
    "fwd": "forward",
    "bwd": "backward",
    "bwd_inner": "backward-backward",
    "bwd_allreduce": "backward-allreduce",
    "step": "optimizer",
    "batch_input": "batch generator",
}
"""DeepSpeed's timers under upstream's names."""

NEVER = sys.maxsize
"""A number of steps that no run has; DeepSpeed's pipeline takes remainders by it, so it must be one."""


class _PatientTimer(SynchronizedWallClockTimer.Timer):
    """A timer that does not mind a second start or stop: DeepSpeed's pipeline times what its engine times already."""

    def start(self) -> None:
        """Start, unless it runs."""
        if not self.started_:
            super().start()

    def stop(self, **options: Any) -> None:
        """Stop, if it runs."""
        if self.started_:
            super().stop(**options)


class StepTimers(SynchronizedWallClockTimer):
    """DeepSpeed's timers, which keep what they measured until it is asked for.

    DeepSpeed would wait for the device after every micro-batch to print it.
    """

    Timer = _PatientTimer

    def __init__(self) -> None:
        super().__init__()
        self.measured: dict[str, list[Any]] = {}

    def log(self, names: list[str], *args: Any, **options: Any) -> None:
        """Put aside what the timers measured, where DeepSpeed would print it."""
        for name in names:
            if name in self.timers:
                timer = self.timers[name]
                if name in NAMES:
                    self.measured.setdefault(name, []).extend(timer.event_timers)
                timer.reset()

    def take(self) -> dict[str, float]:
        """Seconds by upstream's names since the last call; waits for the device."""
        self.log(list(self.timers))
        found = {NAMES[name]: sum(map(_seconds, events)) for name, events in self.measured.items()}
        self.measured = {}
        return found


def _seconds(event: Any) -> float:
    """A host timer is a number already; a pair of CUDA events tells milliseconds."""
    return event if isinstance(event, float) else event.get_elapsed_msec() / 1e3


def console_settings(config: Config) -> dict[str, Any]:
    """Entries of DeepSpeed's dict that keep it from printing what nobody asked for: the console is ours."""
    if config.deepspeed.dump_state:
        set_level(logging.INFO)
    return {} if "steps_per_print" in config.given else {"steps_per_print": NEVER}


def install_timers(engine: Any, config: Config) -> None:
    """Give an engine the timers and the level of messages that the run wants."""
    profiled = (config.deepspeed.flops_profiler or {}).get("enabled")
    prints = "steps_per_print" in config.given
    if config.logging.wall_clock_breakdown or profiled:
        engine.timers = StepTimers()
        engine._update_wall_clock_timers = lambda: None  # it waits for the device, for a cache that nobody reads
        if hasattr(engine.optimizer, "timers"):
            engine.optimizer.timers = NoopTimer()  # it prints three of its own after every step
    elif not prints:
        engine.timers = NoopTimer()  # else the pipeline engine keeps two device events of every step for ever
    verbose = (config.deepspeed.comms_logger or {}).get("verbose")
    set_level(logging.INFO if prints or verbose else logging.WARNING)


@contextmanager
def untimed(engine: Any) -> Iterator[None]:
    """Time nothing meanwhile: DeepSpeed times every forward pass, and that of an evaluation is no part of a step."""
    timers, engine.timers = engine.timers, NoopTimer()
    try:
        yield
    finally:
        engine.timers = timers


def set_level(level: int) -> None:
    """Let DeepSpeed print messages of this level and above."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(level)
    for handler in logger.handlers:
        handler.setLevel(level)
