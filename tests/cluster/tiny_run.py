"""The run that every launcher starts: ten steps of a tiny model, whose losses are known."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

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

    def assert_trained(self, save: Path) -> None:
        """The run in `save` has the ten losses."""
        assert losses(save) == pytest.approx(self.losses, abs=1e-6)


def losses(save: Path) -> list[float]:
    """Losses of a run, by step."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [record["train/lm_loss"] for record in records if "train/lm_loss" in record]


def losses_by_step(save: Path) -> dict[int, float]:
    """Losses of a run that may have done steps twice: those of the last time."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/lm_loss"] for record in records if "train/lm_loss" in record}
