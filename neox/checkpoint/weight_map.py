"""The map of logical tensors from which every reader and writer of a format is derived.

What tensors there are, and of which shape, comes from the model; how each is divided between tensor-parallel ranks,
from the table of `neox.parallel.splits`. A format adds to it only what it calls them and in which order it lays rows.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch

from neox.config import ModelConfig
from neox.model.build import meta_decoder
from neox.parallel.splits import (
    Column,
    Heads,
    Row,
    Vocabulary,
    is_expert,
    row_groups,
    split_dimension,
    split_of,
    take_shard,
)


class Kind(StrEnum):
    """How tensor-parallel ranks share a logical tensor."""

    REPLICATED = "replicated"
    COLUMN = "column"
    ROW = "row"
    VOCABULARY = "vocabulary"
    HEADS = "heads"
    EXPERT = "expert"
    """A matrix of one expert, divided like that of an MLP."""
    ROW_BIAS = "row bias"
    """Replicated here, added once after the reduction. GPT-NeoX's ranks with parallel residuals each add a part."""


@dataclass(frozen=True)
class LogicalTensor:
    """A parameter as it is when nothing is divided.

    Attributes:
        name: canonical, `layers.<disk index>.<name>`.
        shape: whole.
        kind: how ranks share it.
        dimension: the one that is divided; None where it is replicated.
        groups: relative sizes of the groups that lie one after another in its rows (see `row_groups`).
    """

    name: str
    shape: torch.Size
    kind: Kind
    dimension: int | None
    groups: tuple[int, ...]

    @property
    def layer(self) -> int:
        """Disk index of its layer."""
        return int(self.name.split(".")[1])

    @property
    def local(self) -> str:
        """Name within its layer."""
        return self.name.split(".", 2)[2]

    def shares(self, whole: torch.Tensor, size: int) -> list[torch.Tensor]:
        """What each of `size` tensor-parallel ranks holds; of a replicated tensor the same for all."""
        return [take_shard(self.name, whole, rank=rank, size=size, groups=self.groups) for rank in range(size)]


def weight_map(model: ModelConfig) -> dict[str, LogicalTensor]:
    """List a model's logical tensors by canonical name, in the order of the layers; no memory is used."""
    return {
        name: LogicalTensor(
            name=name,
            shape=parameter.shape,
            kind=kind_of(name),
            dimension=split_dimension(name),
            groups=row_groups(name, model),
        )
        for name, parameter in meta_decoder(model).named_parameters()
    }


def kind_of(name: str) -> Kind:
    """How ranks share the parameter of a canonical name."""
    module, _, kind = name.split(".", 2)[2].rpartition(".")
    split = split_of(module)
    if split_dimension(name) is None:
        return Kind.ROW_BIAS if isinstance(split, Row) and kind == "bias" else Kind.REPLICATED
    if is_expert(name):
        return Kind.EXPERT
    kinds = {Column: Kind.COLUMN, Row: Kind.ROW, Vocabulary: Kind.VOCABULARY, Heads: Kind.HEADS}
    return kinds[type(split)]
