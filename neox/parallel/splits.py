"""Which parameter splits how under tensor parallelism: the one table that both the layers and the checkpoints read.

Column splits the outputs (Shoeybi et al. 2019, "Megatron-LM", section 3), Row the inputs, Vocabulary the rows
of the embedding and of the output projection, Heads what has one row for each head. What is not in the table is
replicated; the bias of a Row is one replicated parameter, added after the reduction. Each of several experts is divided
like an MLP, and the sum of all is reduced once.

A fused matrix holds several groups of rows, and a rank takes its share of each:

    query_key_value    multi-head: (q, k, v) of one head after another; a rank takes whole heads
                       GQA and MQA: all of q, then all of k, then all of v; a rank's share is [q_r; k_r; v_r]
    linear1            gated: all of up, then all of gate; a rank's share is [up_r; gate_r]
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from neox.config import ModelConfig

ONE_GROUP = (1,)


@dataclass(frozen=True)
class Column:
    """Outputs divided over the ranks, each of the fused groups for itself."""

    groups: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Inputs divided over the ranks; partial results are summed."""


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary divided over the ranks, padded at the end to a multiple of their number."""


@dataclass(frozen=True)
class Heads:
    """One row for each query head, divided over the ranks; parameters of one dimension are replicated."""


@dataclass(frozen=True)
class Whole:
    """Replicated; each rank finds a part of the gradient."""


Split = Column | Row | Vocabulary | Heads | Whole

SPLITS: dict[str, Split] = {
    "word_embeddings": Vocabulary(),
    "attention.query_key_value": Column(("q", "k", "v")),
    "attention.qk_layernorm": Heads(),
    "attention.dense": Row(),
    "mlp.linear1": Column(("up", "gate")),
    "mlp.linear2": Row(),
    "mlp.router.layer": Whole(),
    "mlp.experts.linear1": Column(("up", "gate")),
    "mlp.experts.linear2": Row(),
    "final_linear": Vocabulary(),
}


_EXPERT = re.compile(r"\bmlp\.experts\.\d+\.")


def split_of(module_name: str) -> Split | None:
    """The split of a module inside its layer, `attention.dense` say; None if it is replicated."""
    return SPLITS.get(of_any_expert(module_name))


def of_any_expert(name: str) -> str:
    """A name with no number of an expert in it: `mlp.experts.linear1` for `mlp.experts.3.linear1`."""
    return _EXPERT.sub("mlp.experts.", name)


def is_expert(name: str) -> bool:
    """Whether a module, or a parameter, of this name belongs to one of several experts."""
    return _EXPERT.search(name) is not None


def split_dimension(parameter_name: str) -> int | None:
    """The dimension along which a parameter is divided, None if it is replicated.

    Of the factors of a low-rank update B A, `lora_B` of a Column is divided and `lora_A` of a Row.

    Args:
        parameter_name: canonical (`layers.2.attention.dense.weight`) or local (`attention.dense.weight`) name.
    """
    split, kind = _split_and_kind(parameter_name)
    if isinstance(split, Whole):
        return None
    whole_on_every_rank = {
        Column: ("lora_A",),
        Row: ("bias", "lora_B"),
        Heads: ("g",),
    }
    if split is None or kind in whole_on_every_rank.get(type(split), ()):
        return None
    return 1 if isinstance(split, Row) else 0


def is_vocabulary(parameter_name: str) -> bool:
    """Whether the rows of a parameter are the vocabulary."""
    return isinstance(_split_and_kind(parameter_name)[0], Vocabulary)


def row_groups(parameter_name: str, model: "ModelConfig") -> tuple[int, ...]:
    """Relative sizes of the groups that lie one after another in the rows of a parameter.

    One group where there is nothing fused, or where the fused parts alternate by head.
    """
    split, _ = _split_and_kind(parameter_name)
    if not isinstance(split, Column) or ("q" in split.groups and not model.is_grouped):
        return ONE_GROUP
    ratio = model.num_attention_heads // model.num_kv_heads
    sizes = {"q": ratio, "k": 1, "v": 1, "up": 1, "gate": int(model.is_gated)}
    groups = tuple(sizes[group] for group in split.groups if sizes[group])
    return groups if len(groups) > 1 else ONE_GROUP


def take_shard(name: str, whole: torch.Tensor, *, rank: int, size: int, groups: Sequence[int]) -> torch.Tensor:
    """The part of a logical tensor that a tensor-parallel rank holds (a view where it can be).

    Vocabulary rows beyond the real ones, needed where `size` does not divide them, are zero.

    Args:
        name: of the parameter, canonical or local.
        whole: the logical tensor.
        rank: of the tensor-parallel group.
        size: of the tensor-parallel group.
        groups: `row_groups` of the parameter.

    Raises:
        ValueError: if the dimension of another tensor, or one of its groups, does not divide by `size`.
    """
    dimension = split_dimension(name)
    if dimension is None or size == 1:
        return whole
    if is_vocabulary(name):
        whole = pad_rows(whole, rows_allocated(whole.shape[0], size))
    parts = whole.split(_group_sizes(name, whole.shape[dimension], groups if dimension == 0 else ONE_GROUP), dimension)
    if any(part.shape[dimension] % size for part in parts):
        raise ValueError(f"{name}: dimension {dimension} of {tuple(whole.shape)} does not divide by {size}")
    shares = [part.chunk(size, dim=dimension)[rank] for part in parts]
    return shares[0] if len(shares) == 1 else torch.cat(shares, dim=dimension)


def join_shards(name: str, shards: list[torch.Tensor], *, shape: torch.Size, groups: Sequence[int]) -> torch.Tensor:
    """The logical tensor of `shape` from the parts of all ranks in order; padding rows are dropped."""
    dimension = split_dimension(name)
    if dimension is None or len(shards) == 1:
        return shards[0][: shape[0]]
    sizes = _group_sizes(name, shards[0].shape[dimension], groups if dimension == 0 else ONE_GROUP)
    by_group = zip(*(shard.split(sizes, dimension) for shard in shards), strict=True)
    return torch.cat([share for shares in by_group for share in shares], dim=dimension)[: shape[0]]


def rows_allocated(vocabulary: int, size: int) -> int:
    """Rows that `size` ranks allocate for a vocabulary: the next multiple of `size`."""
    return -(-vocabulary // size) * size


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`tensor` with zero rows appended up to `rows`."""
    missing = rows - tensor.shape[0]
    return tensor if missing == 0 else torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])))


def _group_sizes(name: str, rows: int, groups: Sequence[int]) -> list[int]:
    total = sum(groups)
    if rows % total:
        raise ValueError(f"{name}: {rows} rows are no multiple of its groups {tuple(groups)}")
    return [rows // total * group for group in groups]


def _split_and_kind(name: str) -> tuple[Split | None, str]:
    """The split of the module a parameter belongs to, and its name in the module."""
    local = name.split(".", 2)[2] if name.startswith("layers.") else name
    module, _, kind = local.rpartition(".")
    return split_of(module), kind
