"""The log of what was left out: a line on stderr, and one in `skipped.jsonl` with the datasets' own numbers."""

import json
import time
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from neox.config import Config
from neox.data.blending import SampleSource
from neox.data.online import OnlineDataset
from neox.data.order import Range, Ranges, read_places
from neox.parallel.mesh import Mesh
from neox.training.metrics.loggers import run_folder
from neox.training.team import tell

SKIPPED = "skipped.jsonl"


class SkipLog:
    """Writes on rank 0; nothing that happens to the file ends a run."""

    def __init__(self, config: Config, mesh: Mesh, dataset: SampleSource | OnlineDataset) -> None:
        self.mesh = mesh
        self.dataset = dataset
        self.path = run_folder(config) / SKIPPED

    def record(self, iteration: int, reason: str, action: str, samples: Range, passed_over: Ranges) -> None:
        """Tell what was left out and why.

        Args:
            iteration: the step, counted from 1.
            reason: what was seen, with the figure.
            action: what was done.
            samples: places in the run's order of samples, [start, end).
            passed_over: ranges of it that were left out before.
        """
        start, end = samples
        tell(self.mesh, f"iteration {iteration}: {reason}; {action}; samples {start} to {end - 1}")
        if self.mesh.rank != 0:
            return
        entry = {
            "iteration": iteration,
            "time": time.time(),
            "reason": reason,
            "action": action,
            "samples": [start, end],
            "origins": self._origins(takewhile(lambda place: place < end, read_places(start, passed_over))),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            tell(self.mesh, f"{self.path}: cannot be written ({error.strerror}); the entry is lost")

    def _origins(self, places: Iterable[int]) -> list[dict[str, Any]]:
        """Where each sample comes from; a server's samples come from nowhere that could be named."""
        dataset = self.dataset
        if isinstance(dataset, OnlineDataset):
            return []
        return [{"place": place} | dataset.origin(place % len(dataset)) for place in places]
