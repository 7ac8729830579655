"""Which linear splits how under tensor parallelism: the one table that both the layers and the checkpoints read.

Column splits the outputs (Shoeybi et al. 2019, "Megatron-LM", section 3), Row the inputs, Vocabulary the rows
of the embedding and of the output projection. What is not in the table is replicated; the bias of a Row is one
replicated parameter, added after the reduction.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Column:
    """Outputs divided over the ranks; the fused groups are interleaved by head, so a rank takes whole heads."""

    groups: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Inputs divided over the ranks; partial results are summed."""


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary divided over the ranks, padded at the end to a multiple of their number."""


Split = Column | Row | Vocabulary

SPLITS: dict[str, Split] = {
    "word_embeddings": Vocabulary(),
    "attention.query_key_value": Column(("q", "k", "v")),
    "attention.dense": Row(),
    "mlp.linear1": Column(("up",)),
    "mlp.linear2": Row(),
    "final_linear": Vocabulary(),
}


def split_of(module_name: str) -> Split | None:
    """The split of a module inside its layer, `attention.dense` say; None if it is replicated."""
    return SPLITS.get(module_name)


def split_dimension(parameter_name: str) -> int | None:
    """The dimension along which a parameter is divided, None if it is replicated.

    Args:
        parameter_name: canonical (`layers.2.attention.dense.weight`) or local (`attention.dense.weight`) name.
    """
    module, _, kind = _local_name(parameter_name).rpartition(".")
    split = split_of(module)
    if split is None or (isinstance(split, Row) and kind == "bias"):
        return None
    return 1 if isinstance(split, Row) else 0


def is_vocabulary(parameter_name: str) -> bool:
    """Whether the rows of a parameter are the vocabulary."""
    return isinstance(split_of(_local_name(parameter_name).rpartition(".")[0]), Vocabulary)


def take_shard(name: str, whole: torch.Tensor, *, rank: int, size: int) -> torch.Tensor:
    """The part of a logical tensor that a tensor-parallel rank holds (a view where it can be).

    Vocabulary rows beyond the real ones, needed where `size` does not divide them, are zero.

    Raises:
        ValueError: if the dimension of another tensor does not divide by `size`.
    """
    dimension = split_dimension(name)
    if dimension is None or size == 1:
        return whole
    if is_vocabulary(name):
        whole = pad_rows(whole, rows_allocated(whole.shape[0], size))
    if whole.shape[dimension] % size:
        raise ValueError(f"{name}: dimension {dimension} of {tuple(whole.shape)} does not divide by {size}")
    return whole.chunk(size, dim=dimension)[rank]


def join_shards(name: str, shards: list[torch.Tensor], *, shape: torch.Size) -> torch.Tensor:
    """The logical tensor of `shape` from the parts of all ranks in order; padding rows are dropped."""
    dimension = split_dimension(name)
    if dimension is None or len(shards) == 1:
        return shards[0][: shape[0]]
    return torch.cat(shards, dim=dimension)[: shape[0]]


def rows_allocated(vocabulary: int, size: int) -> int:
    """Rows that `size` ranks allocate for a vocabulary: the next multiple of `size`."""
    return -(-vocabulary // size) * size


def pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """`tensor` with zero rows appended up to `rows`."""
    missing = rows - tensor.shape[0]
    return tensor if missing == 0 else torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])))


def _local_name(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("layers.") else name
