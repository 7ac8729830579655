"""Writing a checkpoint again where storage refused it."""

import shutil
from collections.abc import Callable
from pathlib import Path

from neox.checkpoint.native.commit import prune_checkpoints
from neox.checkpoint.native.integrity import quick_damages
from neox.checkpoint.native.lineage import Lineage
from neox.checkpoint.native.manifest import latest_name
from neox.checkpoint.native.store import Team
from neox.errors import CheckpointError, UnsavedError
from neox.patience import Patience


def write_patiently(
    write: Callable[[], Path],
    root: Path,
    *,
    team: Team,
    patience: Patience,
    keep: int | None,
    lineage: Lineage,
    tell: Callable[[str], None],
) -> Path:
    """Call `write` until it succeeds or time is up; what it left of a failed try is gone by then. A collective.

    Where the disk is full, those checkpoints of the run go that would go after this one is written: all but the last
    `keep` - 1 that are whole.

    Args:
        write: writes the checkpoint and returns its folder; raises on all ranks if it fails on one.
        root: the folder of checkpoints.
        team: the ranks that write together.
        patience: how long to try, from the first failure on.
        keep: checkpoints to keep; None for all.
        lineage: the run.
        tell: says a line, once for all ranks.

    Raises:
        UnsavedError: on every rank.
    """
    pauses, end = patience.pauses(), 0.0
    told = ""
    while True:
        try:
            folder = write()
        except UnsavedError as error:
            pause = team.gather(next(pauses, None))[0]
            if pause is None:
                raise
            end = end or patience.clock() + patience.seconds
            if team.rank == 0 and str(error) != told:
                told = str(error)
                tell(f"{told}{_space(root)}; trying again for {end - patience.clock():.0f} s")
            if team.rank == 0 and error.is_full and keep is not None and keep > 1:
                # A damaged one may be the newest of them, and this run resumed from the one before.
                for name in prune_checkpoints(root, keep - 1, lineage, is_whole=lambda path: not quick_damages(path)):
                    tell(f"{root / name}: deleted to make room (keep_last_n_checkpoints: {keep})")
            patience.sleep(pause)
        else:
            if told:
                tell(f"{folder}: saved now")
            return folder


def _space(root: Path) -> str:
    """What is free below `root`, and what the newest checkpoint there takes."""
    try:
        free = f"; {_size(shutil.disk_usage(root).free)} are free"
        newest = latest_name(root)
        taken = sum(path.stat().st_size for path in (root / newest).rglob("*") if path.is_file()) if newest else 0
    except (OSError, CheckpointError):
        return ""
    return f"{free}, {newest} takes {_size(taken)}" if newest else free


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
