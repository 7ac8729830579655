"""The data that a run has decided to pass over, kept beside its checkpoints from the moment of the decision."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from neox.checkpoint.native.manifest import Progress
from neox.config import Config
from neox.data.order import Range, merged
from neox.errors import CheckpointError, UserError
from neox.files import write_whole
from neox.parallel.mesh import Mesh
from neox.training.team import tell

LEFT_OUT = "left_out.json"


class LeftOut:
    """`left_out.json` in the folder of `save`: ranges of the order of samples, and of which order.

    A checkpoint holds them too; the file covers the time from a decision to the next save. Without `save` there is
    nothing a run could come back to, and no file.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.mesh = mesh
        self.order = order_of(config)
        settings = config.checkpoint
        self.path = None if settings.save is None else Path(settings.save) / LEFT_OUT
        loaded = [Path(settings.load) / LEFT_OUT] if settings.load is not None and not settings.finetune else []
        self._paths = dict.fromkeys(path.resolve() for path in (self.path, *loaded) if path is not None)
        self.ranges: list[list[int]] = []

    def begin(self, progress: Progress) -> Progress:
        """Add what was written beside checkpoints to what a run knows that is taken up, or begins; a collective.

        Raises:
            CheckpointError: on all ranks, if a file is damaged.
        """
        box: list[Any] = [None, None]
        if self.mesh.rank == 0:
            try:
                box[0] = merged(entry for path in self._paths for entry in self._read(path))
            except CheckpointError as error:
                box[1] = error
        if self.mesh.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        self.ranges = merged([*box[0], *progress.left_out])
        ahead = [f"{start} to {end - 1}" for start, end in self.ranges if end > progress.consumed_samples]
        if ahead:
            tell(self.mesh, f"left out, as decided before: samples {', '.join(ahead)}")
        return replace(progress, left_out=self.ranges)

    def add(self, *ranges: Range) -> list[list[int]]:
        """Remember ranges, on the disk too before anything else happens; returns all there are."""
        known, self.ranges = self.ranges, merged([*self.ranges, *ranges])
        if self.ranges == known:
            return known
        if self.path is not None and self.mesh.rank == 0:
            try:
                write_whole(self.path, json.dumps({"order": self.order, "left_out": self.ranges}) + "\n")
            except UserError as error:
                tell(self.mesh, f"{error}; until the next save a restart knows nothing of the data left out")
        return self.ranges

    def _read(self, path: Path) -> list[list[int]]:
        try:
            content = json.loads(path.read_text())
            order, ranges = content["order"], [[int(start), int(end)] for start, end in content["left_out"]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); remove it to leave no data out") from None
        if order != self.order:
            tell(self.mesh, f"{path}: is about other data than this run's; nothing in it is left out")
            return []
        return ranges


def order_of(config: Config) -> str:
    """A name for the order of samples that a configuration asks for."""
    data = config.data.model_dump(mode="json", exclude={"num_workers"})
    seen = [data, config.comparison.model_dump(mode="json"), config.model.seq_length, config.training.seed]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:16]
