"""A tensor rank's part of a parameter, however the file keeps it: whole, in two pieces, or scattered over ranks."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from neox.checkpoint.storage.torch_file import LazyTensor


class Part(Protocol):
    """What one tensor rank has of a parameter, or of a state that the optimizer keeps of it."""

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of its elements."""
        ...

    def read(self) -> torch.Tensor:
        """Read it on the CPU."""
        ...


class Flat(Part, Protocol):
    """A part of which a stretch can be read."""

    def slice(self, start: int, count: int) -> torch.Tensor:
        """Read `count` elements from `start` on, flat."""
        ...


@dataclass(frozen=True)
class Loaded:
    """A tensor that is in memory already, as those of the oldest files are."""

    tensor: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """See Part."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """See Part."""
        return self.tensor.dtype

    def read(self) -> torch.Tensor:
        """See Part."""
        return self.tensor

    def slice(self, start: int, count: int) -> torch.Tensor:
        """See Flat."""
        return self.tensor.reshape(-1)[start : start + count]


@dataclass(frozen=True)
class Stacked:
    """Rows that were kept as tensors of their own."""

    parts: tuple[Part, ...]

    @property
    def shape(self) -> torch.Size:
        """See Part."""
        first = self.parts[0].shape
        return torch.Size((sum(part.shape[0] for part in self.parts), *first[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """See Part."""
        return self.parts[0].dtype

    def read(self) -> torch.Tensor:
        """See Part."""
        return torch.cat([part.read() for part in self.parts])


@dataclass(frozen=True)
class Fragments:
    """Stretches of flat vectors that make up a tensor, one after another.

    Attributes:
        pieces: vector, first element, number of elements.
        shape: of the tensor.
        dtype: of the tensor; the vectors may have more digits.
    """

    pieces: tuple[tuple[Flat, int, int], ...]
    shape: torch.Size
    dtype: torch.dtype = torch.float32

    def read(self) -> torch.Tensor:
        """See Part."""
        whole = torch.empty(self.shape, dtype=self.dtype)
        flat, position = whole.view(-1), 0
        for vector, start, count in self.pieces:
            flat[position : position + count] = vector.slice(start, count)
            position += count
        return whole


def as_part(item: Any) -> Flat:
    """A tensor or its description as a part."""
    assert isinstance(item, LazyTensor | torch.Tensor), f"{type(item).__name__} is no tensor"
    return Loaded(item) if isinstance(item, torch.Tensor) else item


def is_tensor(item: Any) -> bool:
    """Whether an item of a file is a tensor."""
    return isinstance(item, LazyTensor | torch.Tensor)


def covers(pieces: Iterable[tuple[Flat, int, int]], shape: torch.Size) -> bool:
    """Whether stretches have as many elements as a tensor, and lie within their vectors."""
    listed = list(pieces)
    inside = all(start + count <= vector.shape.numel() for vector, start, count in listed)
    return inside and sum(count for *_, count in listed) == shape.numel()
