"""Which run this is, and whether the folder that it saves to is its own."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from neox.checkpoint.native.lineage import Lineage, checkpoints_in, is_damaged
from neox.checkpoint.native.manifest import listed, numbered_folders
from neox.config import Config
from neox.errors import CheckpointError, UserError
from neox.parallel.mesh import Mesh
from neox.training.origin import Origin
from neox.training.saving import is_save_point
from neox.training.team import tell


def lineage_of(config: Config, origin: Origin | None) -> Lineage:
    """The run that starts: the one that it is resumed from in the folder that it saves to, or else a new one."""
    if origin is None or origin.run is None:
        return Lineage.begun()
    loaded = Lineage.of(origin.run.manifest)
    if not loaded.run:  # of GPT-NeoX
        return Lineage.begun()
    return loaded if _loaded_in_save(config, origin) else Lineage.begun(*loaded.parents, loaded.run)


def agree_on_lineage(config: Config, mesh: Mesh, origin: Origin | None) -> Lineage:
    """`lineage_of`, the same on all ranks, and its place in `save` as the first rank sees it; a collective.

    Raises:
        UserError: on every rank, see `check_save`.
    """
    box: list[Any] = [None]
    if mesh.rank == 0:
        try:
            box[0] = lineage = lineage_of(config, origin)
            for line in check_save(config, origin, lineage):
                tell(mesh, line)
        except UserError as error:
            box[0] = error
    if mesh.world_size > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], UserError):
        raise box[0]
    assert isinstance(box[0], Lineage), "the first rank has drawn it"
    return box[0]


def check_save(config: Config, origin: Origin | None, lineage: Lineage) -> list[str]:
    """See that a run replaces no checkpoint of another one in `save`.

    Args:
        config: of the run.
        origin: what it starts from; None for fresh weights.
        lineage: the run.

    Returns:
        Lines on what is there beside its own and stays, and on what of its own it will replace.

    Raises:
        CheckpointError: there are checkpoints of another run that it would replace, or none of them is what it starts
            from.
    """
    if config.checkpoint.save is None or not config.training.do_train:
        return []
    root = Path(config.checkpoint.save)
    there, loaded, start = numbered_folders(root), _loaded_in_save(config, origin), resumed_at(config, origin)
    names = checkpoints_in(root)
    if start is None and {*names} - {loaded}:
        raise CheckpointError(
            f"save {root}: holds {listed(names)}, which this run does not resume from; "
            "name another folder or move them away, or set auto_resume: true to resume from the newest"
        )
    start = start or 0
    others = {number: path for number, path in there.items() if not lineage.owns(path)}
    ahead = {number for number in there if number > start or (number == start == 0 and is_save_point(config, 0))}
    in_the_way = [path.name for number, path in others.items() if number in ahead and not is_damaged(path)]
    if in_the_way:
        raise CheckpointError(
            f"save {root}: holds {listed(in_the_way)}, which this run did not write and would replace after iteration "
            f"{start}; name another folder, or move them away"
        )
    kept = [path.name for path in others.values()]
    replaced = [there[number].name for number in sorted(ahead - others.keys())]
    lines = [f"save {root}: not written by this run, so they stay: {listed(kept)}"] if kept else []
    if replaced:
        lines.append(f"save {root}: beyond iteration {start}, replaced when the run reaches them: {listed(replaced)}")
    return lines


def resumed_at(config: Config, origin: Origin | None) -> int | None:
    """The iteration at which the run is resumed in the folder that it saves to; None where it begins in it."""
    if origin is None or origin.run is None or _loaded_in_save(config, origin) is None:
        return None
    return origin.run.manifest.progress.iteration


def _loaded_in_save(config: Config, origin: Origin | None) -> str | None:
    """Name of the checkpoint in `save` that the run starts from; None where it is elsewhere."""
    save = config.checkpoint.save
    if origin is None or save is None or origin.weights.folder.resolve().parent != Path(save).resolve():
        return None
    return origin.weights.folder.resolve().name
