"""Folders of checkpoints: how one comes to be there whole, and how it goes.

At each moment `latest` names a folder that is whole, or one whose predecessor `checkpoint_folder` finds beside it.
"""

import contextlib
import logging
import secrets
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from neox.checkpoint.native.lineage import Lineage
from neox.checkpoint.native.manifest import LATEST, MANIFEST, latest_name
from neox.errors import CheckpointError
from neox.files import flush, write_whole
from neox.pulse import pulse

log = logging.getLogger(__name__)

INCOMPLETE, REPLACED, DELETED = "incomplete", "replaced", "deleted"


def begin(final: Path) -> Path:
    """Make the folder that `final` is to be written in, and clear away what a killed run left beside it.

    Its name is of this start: where a run was started twice, what the other one still writes fails, and does not get
    among the files of this one.

    Raises:
        OSError: it cannot be made.
    """
    root = final.parent
    _make_folder(root)
    for replaced in root.glob(f".global_step*.{REPLACED}"):
        original = _original(replaced)
        if not original.exists():
            replaced.rename(original)  # killed between the two renames of `commit`
    for remains in (INCOMPLETE, REPLACED, DELETED):
        for folder in root.glob(f".global_step*.{remains}"):
            doomed = folder.with_name(f"{folder.name}.{DELETED}") if remains == INCOMPLETE else folder
            folder.rename(doomed)  # at once, for whoever writes in it
            _remove(doomed)
    for text in root.glob(f".{LATEST}.*"):  # where `write_whole` was killed
        text.unlink(missing_ok=True)
    temporary = _hidden(final, f"{_start()}.{INCOMPLETE}")
    (temporary / "configs").mkdir(parents=True)
    return temporary


@cache
def _start() -> str:
    """A name for this process, which no other has on whatever host."""
    return secrets.token_hex(4)


def discard(temporary: Path) -> None:
    """Remove what was written of a checkpoint that is not to be."""
    _remove(temporary)


def commit(temporary: Path, final: Path) -> None:
    """Give a folder whose files are all on the disk its name, then move `latest`.

    Raises:
        OSError: the disk fails; `latest` still names what it did.
    """
    for folder in (temporary / "configs", temporary):
        flush(folder)
    replaced = _hidden(final, REPLACED)
    if final.exists():
        _remove(replaced)
        final.rename(replaced)
    temporary.rename(final)
    flush(final.parent)
    write_whole(final.parent / LATEST, final.name)
    flush(final.parent)
    _remove(replaced)


def prune_checkpoints(
    root: Path, keep: int, lineage: Lineage, *, is_whole: Callable[[Path], bool] = lambda folder: True
) -> list[str]:
    """Delete all but the last `keep` checkpoints that a run has written, never the one `latest` names.

    What is not of its lineage stays and does not count. By time and not by number: a run that went back to an earlier
    iteration leaves higher numbers behind. What cannot be deleted stays, with a warning, and so does everything where
    `latest` is damaged.

    Args:
        root: the folder of checkpoints.
        keep: how many stay.
        lineage: the run.
        is_whole: where it says no, as many whole ones stay besides.

    Returns:
        Names of those deleted.
    """
    deleted = []
    try:
        named = latest_name(root)
        own = [path for path in root.glob(f"global_step*/{MANIFEST}") if lineage.owns(path.parent)]
        own.sort(key=_age)
        kept = {named, *[path.parent.name for path in own if is_whole(path.parent)][-keep:]}
        for path in own[:-keep]:
            if path.parent.name not in kept:
                doomed = _hidden(path.parent, DELETED)  # so that a kill leaves no half checkpoint under its name
                path.parent.rename(doomed)
                _remove(doomed)
                deleted.append(path.parent.name)
    except OSError as error:
        log.warning("%s: old checkpoints cannot be deleted (%s)", error.filename or root, error.strerror)
    except CheckpointError as error:
        log.warning("%s: old checkpoints are not deleted (%s)", root, error)
    return deleted


def _age(manifest: Path) -> tuple[int, int, str]:
    """Time, and the number where two are of one tick of a file system's clock."""
    name = manifest.parent.name
    return manifest.stat().st_mtime_ns, len(name), name


def _hidden(folder: Path, state: str) -> Path:
    return folder.with_name(f".{folder.name}.{state}")


def _original(hidden: Path) -> Path:
    return hidden.with_name(hidden.name.removeprefix(".").rpartition(".")[0])


def _remove(folder: Path) -> None:
    """Delete a folder, as far as it can be. The one of a thousand ranks has thousands of files, which takes long."""
    with contextlib.suppress(OSError):
        for path in [] if folder.is_symlink() else list(folder.rglob("*")):
            if not path.is_dir():
                path.unlink(missing_ok=True)
            pulse()
    shutil.rmtree(folder, ignore_errors=True)


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it; their names survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush(path.parent)
