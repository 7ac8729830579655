"""Which checkpoint is loaded: the one asked for, or the newest whole one before it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neox.checkpoint.native.integrity import quick_damages
from neox.checkpoint.native.lineage import was_native
from neox.checkpoint.native.manifest import LATEST, checkpoint_folder, latest_name, numbered_folders
from neox.checkpoint.open import is_checkpoint
from neox.errors import CheckpointError, UnreadError


@dataclass(frozen=True)
class Check:
    """How a checkpoint is looked at before it is loaded.

    Attributes:
        damages: a line for each thing that is wrong with a native checkpoint.
        warn: is told why another one is loaded.
    """

    damages: Callable[[Path], list[str]] = quick_damages
    warn: Callable[[str], None] = lambda line: None


QUICK = Check()
"""Sizes and manifest only, without a word."""


def checkpoint_to_load(root: Path, iteration: int | None, *, fallback: bool, check: Check = QUICK) -> Path | None:
    """The folder of the checkpoint that `load` and `iteration` mean, seen to be whole where it is a native one.

    Args:
        root: a folder of checkpoints, or a checkpoint.
        iteration: which one; None for the one that `latest` names.
        fallback: where it is damaged, return the newest whole one with a smaller number instead.
        check: what damaged means.

    Returns:
        None where there is no checkpoint yet.

    Raises:
        CheckpointError: it is damaged or `latest` is lost, and so are those before it or they do not count; or there is
            none such.
    """
    try:
        is_one = iteration is None and (was_native(root) or (root.is_dir() and is_checkpoint(root)))
        folder = root if is_one else checkpoint_folder(root, iteration)
        found = check.damages(folder) if folder is not None and was_native(folder) else []
    except UnreadError:
        raise
    except CheckpointError as error:
        if iteration is not None:
            raise
        folder, found = root / (_named(root) or LATEST), [str(error)]
    if folder is None or not found:
        return folder
    before = "" if _number(folder) is None else " before it"
    if not fallback:
        raise CheckpointError(f"{_told(found)}; or set load_fallback: true to load the newest whole one{before}")
    for other in _before(folder):
        worse = check.damages(other)
        if not worse:
            check.warn(f"{_told(found)}. load_fallback: loading {other} instead")
            return other
        found += worse
    raise CheckpointError(f"{_told(found)}; load_fallback found no whole checkpoint{before}")


def _named(root: Path) -> str:
    """What `latest` says, where it says anything."""
    try:
        return latest_name(root) or ""
    except UnreadError:
        raise
    except CheckpointError:
        return ""


def _before(folder: Path) -> list[Path]:
    """The native checkpoints beside `folder` with smaller numbers, the highest first.

    By number: a run that went back to an earlier iteration leaves higher ones behind, which it has nothing to do with.
    """
    bound = _number(folder)
    smaller = [path for number, path in numbered_folders(folder.parent).items() if bound is None or number < bound]
    return [path for path in reversed(smaller) if was_native(path)]


def _number(folder: Path) -> int | None:
    """The N of `global_step<N>` or `.global_step<N>.replaced`; None for another name."""
    match = re.fullmatch(r"\.?global_step(\d+)(\.\w+)?", folder.name)
    return int(match[1]) if match else None


def _told(lines: list[str]) -> str:
    """The first of them, and how many there are."""
    return lines[0] + (f" (the first of {len(lines)} damages)" if len(lines) > 1 else "")
