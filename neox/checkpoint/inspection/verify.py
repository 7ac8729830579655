"""Whether a checkpoint of any format is whole, and whether two of them compute the same."""

import logging
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neox.checkpoint.architecture import model_config_of, saved_keys
from neox.checkpoint.described import open_described
from neox.checkpoint.huggingface import INDEX, is_huggingface
from neox.checkpoint.huggingface.files import read_index
from neox.checkpoint.inspection.logits import random_tokens, streamed_logits
from neox.checkpoint.lora import MergedWeights, merged
from neox.checkpoint.native.integrity import damages
from neox.checkpoint.native.manifest import Manifest, is_native
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.storage.progress import byte_bar, progress_bar
from neox.checkpoint.storage.tensor_file import TensorFile
from neox.checkpoint.storage.torch_file import load_torch_file
from neox.checkpoint.upstream.reader import UpstreamReader
from neox.checkpoint.weights import check_shape, missing_tensor
from neox.choices import LOGITS_BATCH_SIZE
from neox.errors import CheckpointError, UserError
from neox.model.build import meta_decoder

logger = logging.getLogger(__name__)

TOLD_BY_TENSORS = (NativeReader, MergedWeights, UpstreamReader)
"""Readers that take shapes from where the tensors are."""

PICKLED = (".pt", ".bin", ".pth")
INDICES = (INDEX, "pytorch_model.bin.index.json")


def damages_of(folder: Path) -> list[str]:
    """Read every file of a checkpoint and look for what is missing or damaged.

    Native checkpoints carry checksums of all their bytes, files of `torch.save` those of their records, other
    safetensors only sizes. In any format, every tensor of the model must be there in the shape it should have.

    Args:
        folder: one checkpoint.

    Returns:
        A line for each thing that is wrong, which it names.
    """
    found = _native_damages(folder) if is_native(folder) else _file_damages(folder)
    return found or _model_damages(folder)


def _native_damages(folder: Path) -> list[str]:
    try:
        total = sum(Manifest.parse(folder).files.values())
    except CheckpointError as error:
        return [str(error)]
    with byte_bar(total, "verifying") as bar:

        def count(_: str, read: int) -> None:
            bar.update(read)

        return damages(folder, each=count)


def _file_damages(folder: Path) -> list[str]:
    """What is wrong with files of other formats, and with the list of files of a Hugging Face folder."""
    found = list(_index_damages(folder)) if is_huggingface(folder) else []
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (*PICKLED, ".safetensors")]
    sizes = {path.name: path.stat().st_size if path.is_file() else 0 for path in files}
    for name in progress_bar(sizes, sizes, "verifying"):
        try:
            _check_file(folder / name)
        except CheckpointError as error:
            found.append(str(error))
    return found


def _check_file(path: Path) -> None:
    """Read a file to its end.

    Raises:
        CheckpointError: it is damaged.
    """
    if path.suffix == ".safetensors":
        TensorFile(path)
    elif not zipfile.is_zipfile(path):
        load_torch_file(path)  # of before torch 1.6, without checksums, or no such file at all
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                record = archive.testzip()
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); copy it again") from None
        if record is not None:
            raise CheckpointError(f"{path}: damaged, record {record} has not the checksum it was written with")


def _index_damages(folder: Path) -> Iterator[str]:
    """Files that the index of a sharded model names and that are not there, or have not the tensors it says."""
    for path in (folder / name for name in INDICES if (folder / name).is_file()):
        try:
            entries = read_index(path)
        except CheckpointError as error:
            yield str(error)
            continue
        for file in sorted(set(entries.values())):
            if not (folder / file).is_file():
                yield f"{folder / file}: missing; {path.name} names it"
            elif file.endswith(".safetensors"):
                yield from _absent(folder / file, [name for name, place in entries.items() if place == file])


def _absent(path: Path, names: Sequence[str]) -> Iterator[str]:
    try:
        held = TensorFile(path)
    except CheckpointError:
        return  # told once, by the check of the file itself
    yield from (f"{path}: has no tensor {name}, and the index says so" for name in names if name not in held)


def _model_damages(folder: Path) -> list[str]:
    """What is missing from the model, or has another shape than its configuration says."""
    try:
        reader = merged(open_checkpoint(folder))
        shapes = reader.shapes()
        is_described = bool(saved_keys(reader))
        expected = dict(meta_decoder(model_config_of(reader)).named_parameters()) if is_described else {}
    except UserError as error:
        return str(error).splitlines()
    if not is_described:
        logger.warning("%s: does not say what its model is, so no tensor can be found to be missing", folder)
    found = []
    for name in progress_bar(expected, {name: p.numel() for name, p in expected.items()}, "reading"):
        try:
            if name not in shapes:
                raise missing_tensor(folder, name)
            # Hugging Face's and Meta's shapes are told by another file than the tensors.
            shape = shapes[name] if isinstance(reader, TOLD_BY_TENSORS) else reader.tensor(name).shape
            check_shape(folder, name, shape, expected[name].shape)
        except CheckpointError as error:
            found.append(str(error))
    return found


@dataclass(frozen=True)
class LogitsComparison:
    """Logits of two checkpoints on the same tokens.

    Attributes:
        difference: the largest; infinite where only one is finite.
        largest: absolute logit of the first.
        agreeing, positions: where both find the same token most likely, of how many.
    """

    difference: float
    largest: float
    agreeing: int
    positions: int

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.3g}, of logits up to {self.largest:.3g}; "
            f"the same most likely token at {self.agreeing} of {self.positions} positions"
        )


def compare_logits(
    first: Path,
    second: Path,
    *,
    tokens_BS: torch.Tensor | None = None,
    config_files: Sequence[str | Path] = (),
    batch_size: int = LOGITS_BATCH_SIZE,
) -> LogitsComparison:
    """Compute the logits of two checkpoints, each in fp32 with one layer in memory at a time.

    Where one has more rows of vocabulary than the other, for padding, only those of both are compared.

    Args:
        first: a checkpoint of any format.
        second: another one.
        tokens_BS: int64 ids; None draws some.
        config_files: the model, where a checkpoint does not say.
        batch_size: sequences that go through a layer together.

    Raises:
        UserError: a checkpoint cannot be read, or the tokens do not fit it.
    """
    described = [open_described(path, config_files) for path in (first, second)]
    opened = [(reader, config.model) for reader, config in described]
    if tokens_BS is None:
        tokens_BS = random_tokens(min((model for _, model in opened), key=lambda model: model.padded_vocab_size or 0))
    vocabulary = min(reader.padded_vocab_size for reader, _ in opened)
    streams = [streamed_logits(reader, model, tokens_BS, batch_size=batch_size) for reader, model in opened]
    difference, largest, agreeing = 0.0, 0.0, 0
    for ours, theirs in zip(*streams, strict=True):
        one_BSV, other_BSV = ours[..., :vocabulary], theirs[..., :vocabulary]
        apart = float((one_BSV - other_BSV).abs().max())
        difference = math.inf if math.isnan(apart) else max(difference, apart)
        largest = max(largest, float(one_BSV.abs().max()))
        agreeing += int((one_BSV.argmax(-1) == other_BSV.argmax(-1)).sum())
    return LogitsComparison(difference, largest, agreeing, tokens_BS.numel())
