"""What is in a checkpoint of any format, tensor by tensor, and in what two checkpoints differ."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from neox.checkpoint.huggingface import HuggingFaceReader
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.storage.progress import progress_bar
from neox.checkpoint.upstream.reader import UpstreamReader
from neox.checkpoint.weights import WeightReader
from neox.errors import ConfigError

PIECE = 2**22
"""Numbers looked at together, in fp64."""


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of a checkpoint.

    Attributes:
        name: canonical.
        shape: whole.
        dtype: of the file, `float16` say.
        bytes: of its numbers.
        norm: root of the sum of squares.
        largest: absolute value.
        not_finite: how many numbers are infinite or not numbers; norm and largest are of the others.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    norm: float
    largest: float
    not_finite: int


@dataclass(frozen=True)
class Difference:
    """In what a tensor of two checkpoints differs.

    Attributes:
        name: canonical.
        kind: `only in the first`, `only in the second`, `shape` or `values`.
        shapes: in the first and the second; None where it is not there.
        norms: of both; 0 where the values were not compared.
        largest: absolute difference; infinite where only one number of a pair is finite.
        norm: root of the sum of squared differences.
    """

    name: str
    kind: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    norms: tuple[float, float] = (0.0, 0.0)
    largest: float = 0.0
    norm: float = 0.0


def selected(readers: Sequence[WeightReader], *, match: str = "", attributes: Sequence[str] = ()) -> list[str]:
    """Names of the tensors of all readers, in their order, that are asked for.

    Args:
        readers: opened checkpoints.
        match: a regular expression that a name has a match of.
        attributes: layers or tensors, `/` being as good as `.` in their names; none for all.

    Raises:
        ConfigError: `match` is no regular expression, or no tensor is meant by it or by one of `attributes`.
    """
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise ConfigError(f"--match {match}: no regular expression ({error}); put a backslash before signs") from None
    wanted = [attribute.replace("/", ".").strip(".") + "." for attribute in attributes]
    names = dict.fromkeys(name for reader in readers for name in reader.names() if pattern.search(name))
    if not names and match:
        raise ConfigError(f"--match {match}: no tensor has such a name; run without it to see all names")
    for attribute, prefix in zip(attributes, wanted, strict=True):
        if not any(f"{name}.".startswith(prefix) for name in names):
            raise ConfigError(f"--attributes {attribute}: no such tensor or layer; run without it to see all names")
    return [name for name in names if not wanted or any(f"{name}.".startswith(prefix) for prefix in wanted)]


def facts(reader: WeightReader, names: Iterable[str]) -> Iterator[TensorFacts]:
    """Read tensors one by one and say what they are."""
    for name in progress_bar(names, tensor_bytes(reader), "reading"):
        yield facts_of(name, reader.tensor(name))


def facts_of(name: str, tensor: torch.Tensor) -> TensorFacts:
    """Say what a tensor is."""
    squares, largest, not_finite = 0.0, 0.0, 0
    for piece in _pieces(tensor):
        finite = torch.isfinite(piece)
        kept = piece[finite] if not finite.all() else piece
        not_finite += piece.numel() - kept.numel()
        squares += float(kept.square().sum())
        largest = max(largest, float(kept.abs().max())) if kept.numel() else largest
    return TensorFacts(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        bytes=tensor.nbytes,
        norm=math.sqrt(squares),
        largest=largest,
        not_finite=not_finite,
    )


def differences(first: WeightReader, second: WeightReader, names: Iterable[str]) -> Iterator[Difference | None]:
    """Compare two checkpoints tensor by tensor; None stands for a tensor whose values are equal.

    Values are compared as numbers, so an fp16 tensor equals its copy in fp32.
    """
    shapes, others = first.shapes(), second.shapes()
    for name in progress_bar(names, tensor_bytes(second) | tensor_bytes(first), "comparing"):
        both = (shapes.get(name), others.get(name))
        if None in both:
            yield Difference(name, "only in the first" if both[1] is None else "only in the second", both)
        elif both[0] != both[1]:
            yield Difference(name, "shape", both)
        else:
            yield _difference(name, first.tensor(name), second.tensor(name))


def _difference(name: str, first: torch.Tensor, second: torch.Tensor) -> Difference | None:
    squares, largest = [0.0, 0.0, 0.0], 0.0
    for one, other in zip(_pieces(first), _pieces(second), strict=True):
        same = (one == other) | (one.isnan() & other.isnan())
        apart = (one - other).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        largest = max(largest, float(apart.max()))
        squares = [total + float(part.square().sum()) for total, part in zip(squares, (one, other, apart), strict=True)]
    if largest == 0.0:
        return None
    *norms, norm = map(math.sqrt, squares)
    shape = tuple(first.shape)
    return Difference(name, "values", (shape, shape), norms=(norms[0], norms[1]), largest=largest, norm=norm)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The numbers of a tensor in fp64, some at a time."""
    for piece in tensor.detach().reshape(-1).split(PIECE):
        if piece.numel():
            yield piece.double()


def tensor_bytes(reader: WeightReader) -> dict[str, int]:
    """Bytes of each tensor at two for a number, for a progress bar: the type is known only when it has been read."""
    return {name: 2 * math.prod(shape) for name, shape in reader.shapes().items()}


def description(reader: WeightReader) -> dict[str, Any]:
    """What a checkpoint says of itself besides its tensors: format, progress, layout, size on disk."""
    files = [path for path in reader.folder.iterdir() if path.is_file()]
    size = {"files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    match reader:
        case NativeReader(manifest=manifest):
            found: dict[str, Any] = {"format": "native", "iteration": manifest.progress.iteration}
            found |= {"consumed_samples": manifest.progress.consumed_samples, "precision": manifest.precision}
            runs = {"run": manifest.run or None, "resumed_from": " ".join(manifest.lineage) or None}
            found |= {key: value for key, value in runs.items() if value is not None}
            return found | {"optimizer": manifest.optimizer} | asdict(manifest.layout) | size
        case UpstreamReader(files=held):
            kind = "pipeline" if any(reader.folder.glob("layer_*")) else "sequential"
            found = {"format": f"GPT-NeoX, {'ZeRO 3' if held.is_zero3 else kind} layout"}
            return found | {"iteration": reader.iteration, "model_parallel_size": held.ranks} | size
        case HuggingFaceReader():
            return {"format": f"Hugging Face, {reader.family.architecture}"} | size
    return {"format": type(reader).__name__.removesuffix("Reader")} | size
