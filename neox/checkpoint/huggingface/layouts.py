"""How a matrix that is one here is kept apart, or in another order of rows, by other projects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from neox.config import ModelConfig


class Layout(Protocol):
    """A reordering of rows that loses nothing; weights [rows, D] and biases [rows] alike."""

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Our tensor as theirs, one for each of their names."""
        ...

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        ...


class Same:
    """One tensor, the same on both sides."""

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Layout."""
        return (ours,)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Layout."""
        (tensor,) = theirs
        return tensor


class Stacked:
    """Two tensors of one size, above each other in ours: [up; gate] of a gated MLP."""

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Layout."""
        return ours.chunk(2)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Layout."""
        return torch.cat(list(theirs))


@dataclass(frozen=True)
class SeparateQKV:
    """Queries, keys and values apart; ours is per head [N, (q, k, v), H], or [Q; K; V] where heads share keys."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: ModelConfig) -> "SeparateQKV":
        """The layout of a model."""
        return cls(config.num_attention_heads, config.num_kv_heads, config.head_dim)

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Layout."""
        if self.kv_heads != self.heads:
            return ours.split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)])
        by_head = ours.reshape(self.heads, 3, self.head_dim, *ours.shape[1:])
        return tuple(part.reshape(-1, *ours.shape[1:]) for part in by_head.unbind(1))

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Layout."""
        if self.kv_heads != self.heads:
            return torch.cat(list(theirs))
        rest = theirs[0].shape[1:]
        by_head = [part.reshape(self.heads, self.head_dim, *rest) for part in theirs]
        return torch.stack(by_head, dim=1).reshape(-1, *rest)


class StackedQKV(SeparateQKV):
    """One matrix [Q; K; V] whatever the number of heads of keys, as GPT-2 has it."""

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Layout."""
        return (torch.cat(super().split(ours)),)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Layout."""
        (tensor,) = theirs
        return super().join(tensor.split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]))


@dataclass(frozen=True)
class Transposed:
    """Matrices stored [input, output], as GPT-2's are; biases as they are."""

    inner: Layout

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Layout."""
        return tuple(_turned(tensor) for tensor in self.inner.split(ours))

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Layout."""
        return self.inner.join([_turned(tensor) for tensor in theirs])


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t() if tensor.dim() == 2 else tensor


@dataclass(frozen=True)
class GroupedQKV(SeparateQKV):
    """One matrix with the queries of a group before its key and value: [K, (q..., k, v), H], as Falcon has it.

    With one group, or as many as heads, that is our order of rows too.
    """

    def split(self, ours: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See Layout."""
        groups = [part.reshape(self.kv_heads, -1, *ours.shape[1:]) for part in super().split(ours)]
        return (torch.cat(groups, dim=1).reshape(ours.shape),)

    def join(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor:
        """See Layout."""
        (tensor,) = theirs
        groups = tensor.reshape(self.kv_heads, -1, *tensor.shape[1:])
        queries = self.heads // self.kv_heads * self.head_dim
        parts = groups.split([queries, self.head_dim, self.head_dim], dim=1)
        return super().join([part.reshape(-1, *tensor.shape[1:]) for part in parts])
