"""A run that is started again goes on from the newest whole checkpoint of its own, whatever it was started from."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from neox.checkpoint.native.fallback import checkpoint_to_load
from neox.checkpoint.native.manifest import MANIFEST, checkpoint_folder, is_native, numbered_folders
from neox.config import Config
from neox.errors import CheckpointError
from neox.launch.restarts import times_restarted
from neox.parallel.mesh import Mesh
from neox.training.origin import load_folder
from neox.training.team import team_of

BEGUN = ".begun"
"""File in `save` that is as old as the run, where there were checkpoints of another before it."""

_SECONDS_TO_AGREE = 90.0
"""In which a network file system shows all hosts the same; NFS keeps what it knows of a folder for a minute."""

_POLL_SECONDS = 1.0


def going_on(config: Config, *, restarted: bool) -> Config:
    """`config`, made to load from `save` where `auto_resume` asks for that and there is a checkpoint of this run.

    Args:
        config: of the run.
        restarted: whether the run was started again, which is what an absent `auto_resume` asks.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    asked, save = config.reliability.auto_resume, config.checkpoint.save
    if save is None or not (restarted if asked is None else asked):
        return config
    newest = checkpoint_to_load(Path(save), None, fallback=True)
    if newest is None or (asked is None and not _is_own(newest)):
        return config
    return config.going_on_from_save()


def expected(config: Config, environ: Mapping[str, str]) -> Config:
    """What `agree_on_origin` will most likely give, for checks before the ranks have met.

    A rank of torchrun may be one of a restart without knowing; it then passes over a damaged checkpoint, which is
    looked at again.
    """
    config = going_on(config, restarted=times_restarted(environ) > 0)
    passes = may_be_restarted(config, environ) and config.checkpoint.load is not None
    return config.passing_over_damage() if passes else config


def may_be_restarted(config: Config, environ: Mapping[str, str]) -> bool:
    """Whether this may be a restart, which `auto_resume` leaves to the launcher, and only other ranks know of it."""
    return config.reliability.auto_resume is None and environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"


def agree_on_origin(config: Config, mesh: Mesh) -> Config:
    """`config` as `going_on` gives it, the same on all ranks, which all see the same checkpoint; a collective.

    Raises:
        CheckpointError: they do not within a minute and a half, or the checkpoint cannot be used.
    """
    gather = team_of(mesh).gather
    restarted = max(gather(times_restarted(os.environ))) > 0
    deadline = time.monotonic() + _SECONDS_TO_AGREE
    while True:
        error, found = None, config
        try:
            found = going_on(config, restarted=restarted)
            seen = str(load_folder(found))
        except CheckpointError as raised:
            error, seen = raised, str(raised)
        views = gather((seen, socket.gethostname(), time.monotonic() > deadline))
        if len({view for view, _, _ in views}) == 1:
            break
        if any(late for _, _, late in views):
            raise CheckpointError(_told(views, config))
        time.sleep(_POLL_SECONDS)
    if error is not None:
        raise error
    if not restarted and mesh.rank == 0:
        _note_beginning(found)
    return found


def _told(views: list[tuple[str, str, bool]], config: Config) -> str:
    by_view = {view: host for view, host, _ in reversed(views)}
    seen = "; ".join(f"{host} sees {view}" for view, host in by_view.items())
    return f"save {config.checkpoint.save}: hosts do not see the same checkpoint: {seen}; it must be one folder for all"


def _note_beginning(config: Config) -> None:
    """Where `save` holds checkpoints that the run does not go on from, remember when it began."""
    save = config.checkpoint.save
    if save is None or config.reliability.auto_resume is not None:
        return
    try:
        newest = checkpoint_folder(Path(save))
    except CheckpointError:  # `latest` is lost, or what it names
        newest = next(reversed(numbered_folders(Path(save)).values()), None)
    if newest is not None and newest != load_folder(config):
        (Path(save) / BEGUN).touch()


def _is_own(folder: Path) -> bool:
    """Whether a checkpoint is no older than the run, which writes no other format than ours."""
    begun = folder.parent / BEGUN
    if not begun.is_file():
        return True
    return is_native(folder) and (folder / MANIFEST).stat().st_mtime_ns >= begun.stat().st_mtime_ns
