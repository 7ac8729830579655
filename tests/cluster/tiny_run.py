"""The run that every launcher starts: ten steps of a tiny model, whose losses are known."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hosts import wait_until

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Training:
    """A tiny run, to be started on the hosts.

    Attributes:
        config: its configuration file.
        losses: of ten steps by two processes on one host.
    """

    config: Path
    losses: list[float]

    def script(self, save: Path, *overrides: str) -> list[str]:
        """`train.py` with its arguments."""
        return [str(ROOT / "train.py"), str(self.config), f"save={save}", *overrides]

    @contextlib.contextmanager
    def held(self) -> Iterator[Path]:
        """Have `held_script` not come to its end before this `with` does, or the file that it gives is gone."""
        hold = self.config.with_name("hold")
        hold.touch()
        try:
            yield hold
        finally:
            hold.unlink(missing_ok=True)

    def held_script(self, save: Path, *overrides: str) -> list[str]:
        """The same as `script`, but it waits before its last steps."""
        return [str(ROOT / "tests" / "held_train.py"), *self.script(save, *overrides)[1:]]

    def assert_trained(self, save: Path) -> None:
        """The run in `save` has the ten losses."""
        assert losses(save) == pytest.approx(self.losses, abs=1e-6)


def records(save: Path) -> list[dict[str, float]]:
    """Metrics of a run that may be going on: without the line that is being written."""
    whole = (save / "metrics.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def losses(save: Path) -> list[float]:
    """Losses of a run, by step."""
    return [record["train/lm_loss"] for record in records(save) if "train/lm_loss" in record]


def losses_by_step(save: Path) -> dict[int, float]:
    """Losses of a run that may have done steps twice: those of the last time."""
    return {int(record["step"]): record["train/lm_loss"] for record in records(save) if "train/lm_loss" in record}


def wait_for_step_after(save: Path, happened: Callable[[], bool], what: str) -> None:
    """Wait until a run has come to something, and has done a step since."""
    log, size = save / "metrics.jsonl", 0

    def has_come() -> bool:
        nonlocal size
        has = happened()
        # By the time at which this is called it may have done all its steps.
        size = size if has and size else log.stat().st_size
        return has

    wait_until(has_come, what, 600)
    wait_until(lambda: log.stat().st_size > size, f"a step after {what}", 600)
