"""Logits of a checkpoint of any format, computed with one layer in memory at a time."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from neox.checkpoint.storage.progress import progress_bar
from neox.checkpoint.weights import WeightReader, weight_source
from neox.choices import LOGITS_BATCH_SIZE
from neox.config import ModelConfig
from neox.errors import CheckpointError, DataError
from neox.files import whole_file
from neox.model.build import build_layer
from neox.model.layers import layer_list
from neox.model.positions import longest_input


def streamed_logits(
    reader: WeightReader,
    config: ModelConfig,
    tokens_BS: torch.Tensor,
    *,
    batch_size: int = LOGITS_BATCH_SIZE,
    label: str = "layers",
) -> Iterator[torch.Tensor]:
    """Compute logits in fp32, all sequences through one layer before the next layer is read.

    Memory holds one layer and the residual stream of all sequences; what comes out is what the whole model in fp32
    computes for `batch_size` sequences at a time.

    Args:
        reader: the weights.
        config: the model.
        tokens_BS: int64 ids [B, S].
        batch_size: sequences that go through a layer together.
        label: before the progress bar.

    Yields:
        Logits [b, S, V] of at most `batch_size` sequences, in their order, V the padded vocabulary.

    Raises:
        CheckpointError: the weights do not fit the configuration.
        DataError: the tokens do not fit the model.
    """
    check_tokens(tokens_BS, config)
    streams = list(tokens_BS.split(batch_size))
    build = partial(build_layer, model=config, source=weight_source(reader), tied=not config.no_weight_tying)
    *below, head = layer_list(config)
    specs = {str(spec.disk_index): spec for spec in below}
    for index in progress_bar(specs, _layer_bytes(reader, list(specs)), label):
        _advance(build(specs[index]), streams)
    final = build(head).eval()
    while streams:
        with torch.no_grad():
            logits = final(streams.pop(0))
        yield logits  # outside: a generator that is not read to its end would leave gradients off for good


@torch.no_grad()
def _advance(layer: nn.Module, streams: list[torch.Tensor]) -> None:
    """Put every stream through a layer, each in place of what it was."""
    layer.eval()
    for number, stream in enumerate(streams):
        streams[number] = layer(stream)


def _layer_bytes(reader: WeightReader, indices: list[str]) -> dict[str, int]:
    sizes = dict.fromkeys(indices, 0)
    for name, shape in reader.shapes().items():
        index = name.split(".")[1]
        if index in sizes:
            sizes[index] += torch.Size(shape).numel() * torch.float32.itemsize
    return sizes


def check_tokens(tokens_BS: torch.Tensor, config: ModelConfig) -> None:
    """See that ids and length are ones that the model has.

    Raises:
        DataError: naming the first that is not.
    """
    vocabulary = config.padded_vocab_size
    assert vocabulary is not None, "the vocabulary is resolved before a model is built"
    outside = tokens_BS[(tokens_BS < 0) | (tokens_BS >= vocabulary)]
    if outside.numel():
        raise DataError(f"tokens: {int(outside[0])} is no id of this model; its ids are 0 to {vocabulary - 1}")
    longest = longest_input(config)
    if config.pos_emb in ("learned", "rotary") and tokens_BS.shape[1] > longest:
        raise DataError(f"tokens: sequences of {tokens_BS.shape[1]} ids, the model has {longest} positions; cut them")


def read_tokens(path: Path) -> torch.Tensor:
    """Read int64 ids [B, S] from a .npy file of integers [B, S] or [S].

    Raises:
        DataError: it is no such file.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or 'not a .npy file'}); save ids with numpy"
        ) from None
    except (ValueError, EOFError):
        raise DataError(f"{path}: not a .npy file of numbers; save ids with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: an archive of several arrays; save the ids alone with numpy.save")
    if array.dtype.kind not in "iu":
        raise DataError(f"{path}: holds {array.dtype}; token ids are integers")
    if array.ndim not in (1, 2) or array.size == 0:
        raise DataError(f"{path}: has shape {list(array.shape)}; ids come as [sequences, tokens] or [tokens]")
    return torch.from_numpy(np.atleast_2d(array).astype(np.int64))


def random_tokens(config: ModelConfig, *, sequences: int = 2, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Draw ids [B, S] of a model's vocabulary, shorter where it has fewer positions."""
    assert config.padded_vocab_size is not None, "the vocabulary is resolved before a model is built"
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.padded_vocab_size, (sequences, min(length, config.seq_length)), generator=generator)


def write_logits(path: Path, logits: Iterator[torch.Tensor], shape: tuple[int, int, int]) -> None:
    """Write logits [B, S, V] as fp32 .npy, a few sequences at a time; the file appears when it is whole.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in logits:
                file.write(part.contiguous().numpy().astype("<f4", copy=False).data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose another place") from None
