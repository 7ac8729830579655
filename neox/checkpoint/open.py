"""Opening a checkpoint of any known format."""

from pathlib import Path

from neox.checkpoint.huggingface import HuggingFaceReader, is_huggingface
from neox.checkpoint.huggingface.files import weights_in
from neox.checkpoint.meta_llama import MetaLlamaReader, is_meta_llama
from neox.checkpoint.native.manifest import MANIFEST, checkpoint_folder, is_native, listed
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.upstream.files import is_upstream
from neox.checkpoint.upstream.reader import NO_HINTS, Hints, UpstreamReader
from neox.checkpoint.weights import WeightReader
from neox.errors import CheckpointError


def open_checkpoint(
    path: Path,
    iteration: int | None = None,
    *,
    hints: Hints = NO_HINTS,
) -> WeightReader:
    """Open the weights at `path`, whatever wrote them.

    Args:
        path: a folder of checkpoints with `latest` in it, one of its `global_step<N>` folders, or a folder of
            Hugging Face's or of Meta's.
        iteration: which checkpoint of the folder; None for the one that `latest` names.
        hints: see `UpstreamReader`.

    Raises:
        CheckpointError: there is nothing that can be read; says what was found.
    """
    folder = locate_checkpoint(path, iteration)
    _check_one_format(folder)
    if is_native(folder):
        return NativeReader(folder)
    if is_upstream(folder):
        return UpstreamReader(folder, hints)
    if is_meta_llama(folder):
        return MetaLlamaReader(folder)
    return HuggingFaceReader(folder)


def locate_checkpoint(path: Path, iteration: int | None = None) -> Path:
    """The folder of the one checkpoint that `path` and `iteration` mean (see `open_checkpoint`); not opened.

    Raises:
        CheckpointError: there is none; says what was found.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a folder of checkpoints, or of a Hugging Face model")
    if iteration is None and is_checkpoint(path):
        return path
    folder = checkpoint_folder(path, iteration) or path
    if is_checkpoint(folder):
        return folder
    raise CheckpointError(
        f"{folder}: no checkpoint; found {_contents(folder)}, expected {MANIFEST} (native), mp_rank_* or layer_* "
        "files (GPT-NeoX), config.json (Hugging Face) or params.json (Meta's Llama)"
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder itself is a checkpoint of a known format."""
    return is_native(folder) or is_upstream(folder) or is_huggingface(folder) or is_meta_llama(folder)


def _check_one_format(folder: Path) -> None:
    """Refuse a folder with the weights of two formats: nothing says which of them is the model."""
    found = {
        "this project's": is_native(folder),
        "GPT-NeoX's": is_upstream(folder),
        "Meta's": is_meta_llama(folder),
        "Hugging Face's": is_huggingface(folder) and bool(weights_in(folder)),
    }
    formats = [name for name, is_there in found.items() if is_there]
    if len(formats) > 1:
        raise CheckpointError(
            f"{folder}: holds weights in {' and '.join(formats)} format; give each a folder of its own"
        )


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return listed(names) if names else "nothing"
