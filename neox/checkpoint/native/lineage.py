"""Which run owns a checkpoint. A run deletes and replaces what it wrote itself, and nothing else.

A run, all its restarts included, has one name, drawn when it begins and kept in every manifest that it writes. It is
the same run where it is resumed from the folder that it saves to. Resumed from another folder it is a new run, of the
same lineage. A checkpoint of GPT-NeoX, an import, and one whose manifest is damaged belong to no known run: they stay.
"""

import logging
import uuid
from dataclasses import dataclass
from pathlib import Path

from neox.checkpoint.native.manifest import Manifest, is_native, latest_name, listed, numbered_folders
from neox.errors import CheckpointError, UnreadError

log = logging.getLogger(__name__)

KEPT = "kept_"
"""Before the name of a folder that was in the way of a save."""


@dataclass(frozen=True)
class Lineage:
    """A run, and those that it was resumed from in other folders.

    Attributes:
        run: its name; empty for what is not written by a run.
        parents: the names of the others, the oldest first.
    """

    run: str = ""
    parents: tuple[str, ...] = ()

    @classmethod
    def begun(cls, *parents: str) -> "Lineage":
        """A new run."""
        return cls(uuid.uuid4().hex, parents)

    @classmethod
    def of(cls, manifest: Manifest) -> "Lineage":
        """The one that a checkpoint names."""
        return cls(manifest.run, tuple(manifest.lineage))

    def owns(self, folder: Path) -> bool:
        """Whether a folder is a native checkpoint of this lineage, which the run may replace and delete.

        Raises:
            UnreadError: storage does not give its manifest.
        """
        manifest = _manifest(folder)
        return manifest is not None and self.includes(manifest.run)

    def includes(self, run: str) -> bool:
        """Whether a run is this one or one that it was resumed from; what no run wrote has no name and is none."""
        return bool(run) and run in (self.run, *self.parents)

    def check_place(self, final: Path) -> None:
        """See that a checkpoint may take the name of `final`.

        Raises:
            CheckpointError: what is there is not of this lineage.
        """
        if _is_filled(final) and not self.owns(final) and not is_damaged(final):
            raise CheckpointError(
                f"{final}: was not written by this run, which does not replace it; set save to another folder"
            )

    def make_way(self, final: Path) -> None:
        """`check_place`, and move a damaged checkpoint that is there aside.

        Raises:
            CheckpointError: what is there is not of this lineage.
            OSError: it cannot be moved.
        """
        self.check_place(final)
        if not _is_filled(final) or self.owns(final):
            return
        number, kept = 1, final.with_name(f"{KEPT}{final.name}")
        while kept.exists():
            number, kept = number + 1, final.with_name(f"{KEPT}{final.name}_{number + 1}")
        final.rename(kept)
        log.warning("%s: damaged, so the run that wrote it is unknown; kept as %s", final, kept.name)


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def was_native(folder: Path) -> bool:
    """Whether this is a native checkpoint, or was one before its manifest was lost."""
    return is_native(folder) or any(folder.glob("model-?????-???.safetensors"))


def is_damaged(folder: Path) -> bool:
    """Whether this was a native checkpoint, and its manifest is lost or damaged.

    Raises:
        UnreadError: storage does not give its manifest.
    """
    return was_native(folder) and _manifest(folder) is None


def _manifest(folder: Path) -> Manifest | None:
    """What a native checkpoint says of itself; None where it is none, or is damaged."""
    try:
        return Manifest.parse(folder) if is_native(folder) else None
    except UnreadError:
        raise
    except CheckpointError:
        return None


def check_vacant(root: Path) -> None:
    """See that a folder holds no checkpoints, so that nothing new becomes the newest checkpoint of a run there.

    Raises:
        CheckpointError: it does.
    """
    there = checkpoints_in(root)
    if there:
        raise CheckpointError(f"{root}: holds checkpoints already ({listed(there)}); name another folder")


def checkpoints_in(root: Path) -> list[str]:
    """Names of the checkpoints in a folder: those with a number, else the one that `latest` names, whatever its name.

    Raises:
        CheckpointError: see `latest_name`.
    """
    numbered = [path.name for path in numbered_folders(root).values()]
    if numbered:
        return numbered
    tag = latest_name(root)
    return [tag] if tag and (root / tag).is_dir() else []
