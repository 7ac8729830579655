"""Opening a checkpoint of any known format."""

from pathlib import Path

from neox.checkpoint.huggingface import HuggingFaceReader, is_huggingface
from neox.checkpoint.manifest import MANIFEST, checkpoint_folder, is_native
from neox.checkpoint.native import NativeReader
from neox.checkpoint.upstream import UpstreamReader
from neox.checkpoint.upstream_files import is_upstream
from neox.checkpoint.weights import WeightReader
from neox.errors import CheckpointError


def open_checkpoint(path: Path, iteration: int | None = None, *, gpt_j_residual: bool | None = None) -> WeightReader:
    """Open the weights at `path`, whatever wrote them.

    Args:
        path: a folder of checkpoints with `latest` in it, one of its `global_step<N>` folders, or a folder of
            Hugging Face's.
        iteration: which checkpoint of the folder; None for the one that `latest` names.
        gpt_j_residual: see `UpstreamReader`.

    Raises:
        CheckpointError: there is nothing that can be read; says what was found.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a folder of checkpoints, or of a Hugging Face model")
    folder = path
    if iteration is not None or not _is_checkpoint(path):
        folder = checkpoint_folder(path, iteration) or path
    if is_native(folder):
        return NativeReader(folder)
    if is_upstream(folder):
        return UpstreamReader(folder, gpt_j_residual=gpt_j_residual)
    if is_huggingface(folder):
        return HuggingFaceReader(folder)
    raise CheckpointError(
        f"{folder}: no checkpoint; found {_contents(folder)}, expected {MANIFEST} (native), mp_rank_* or layer_* "
        "files (GPT-NeoX) or config.json (Hugging Face)"
    )


def _is_checkpoint(folder: Path) -> bool:
    return is_native(folder) or is_upstream(folder) or is_huggingface(folder)


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"
