"""`s3_path`: every checkpoint goes to a store too, and training does not depend on it."""

from pathlib import Path

from neox.checkpoint.native.lineage import Lineage
from neox.checkpoint.native.manifest import listed
from neox.checkpoint.native.s3 import S3Folder, upload_checkpoint
from neox.checkpoint.native.store import Team
from neox.config.training import CheckpointConfig
from neox.errors import CheckpointError


class Uploads:
    """Uploads checkpoints, and once more with the next one those that could not be.

    Attributes:
        waiting: those that are still to be uploaded, the oldest first; the same on every rank.
    """

    def __init__(self, settings: CheckpointConfig) -> None:
        assert settings.s3_path is not None, "an address was given"
        self._target = S3Folder(settings.s3_path, part_bytes=settings.s3_chunk_size)
        self.waiting: list[Path] = []

    def upload(self, folder: Path, team: Team) -> str | None:
        """Upload a checkpoint after those that wait. A collective of the team.

        Returns:
            A warning where it failed, or one that waited is gone.
        """
        there = team.gather([path.is_dir() for path in self.waiting])[0]
        gone = [path.name for path, is_there in zip(self.waiting, there, strict=True) if not is_there]
        self.waiting = [path for path in self.waiting if path.name not in gone] + [folder]
        warnings = [f"{', '.join(gone)} deleted before the store had it, and never uploaded"] if gone else []
        while self.waiting:
            problem = upload_checkpoint(self.waiting[0], self._target, team)
            if problem:
                names = ", ".join(path.name for path in self.waiting)
                warnings.append(f"{names} not uploaded ({problem}); tried again at the next save")
                break
            self.waiting.pop(0)
        return f"s3_path {self._target.address}: {'; '.join(warnings)}" if warnings else None


def check_store(settings: CheckpointConfig) -> None:
    """See before a run that its checkpoints can be uploaded.

    Raises:
        ConfigError: boto3 is not installed, or the bucket cannot be reached.
    """
    if settings.s3_path is not None:
        S3Folder(settings.s3_path, part_bytes=settings.s3_chunk_size, attempts=2).check()


def check_copies(settings: CheckpointConfig, lineage: Lineage, start: int | None) -> None:
    """See before a run that it replaces no other run's copies.

    Args:
        settings: where to.
        lineage: the run.
        start: the iteration that it is resumed from; None for a run that begins, of which nothing can be there.

    Raises:
        CheckpointError: it would.
        ConfigError: the store cannot be asked.
    """
    if settings.s3_path is None or settings.save is None:
        return
    target = S3Folder(settings.s3_path, part_bytes=settings.s3_chunk_size)
    others = target.others(Path(settings.save).resolve().name, lineage, start=start)
    if others:
        raise CheckpointError(
            f"s3_path {settings.s3_path}: holds {listed(others)} of another run; name another s3_path or save"
        )
