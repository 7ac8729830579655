"""Tensor and sequence parallelism, applied to a finished layer from outside.

megatron-core's layers replace the linears that the table of splits names. They expect [S, B, ...] where the
sequence is divided, so these wrappers turn the residual stream [B, S, D] around at the borders; only the share
of a rank is ever copied.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import nn

from neox.parallel.mesh import Mesh
from neox.parallel.regions import EnterParts, LeaveParts
from neox.parallel.rng import divide_dropout
from neox.parallel.splits import (
    Column,
    Heads,
    Row,
    Split,
    Vocabulary,
    Whole,
    is_expert,
    rows_allocated,
    split_dimension,
    split_of,
)
from neox.parallel.vocabulary import ShardedVocabulary


class ColumnLinear(ColumnParallelLinear):
    """[B, S, D] -> [B, S, out/T]; under sequence parallelism the input is [B, S/T, D]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Multiply, gathering the sequence first where it is divided."""
        if not self.sequence_parallel:
            return super().forward(x)[0]
        return super().forward(x.transpose(0, 1).contiguous())[0].transpose(0, 1)


class RowLinear(RowParallelLinear):
    """[B, S, in/T] -> [B, S, D], or [B, S/T, D] under sequence parallelism."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Multiply, sum over the ranks, add the bias."""
        if not self.sequence_parallel:
            return super().forward(x)[0]
        return super().forward(x.transpose(0, 1))[0].transpose(0, 1).contiguous()


class SumOverRanks(torch.autograd.Function):
    """A sum over the tensor-parallel group, every rank getting it; so gradients are summed over the group too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """Add up `x` of all ranks."""
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """Each rank used the sum for what it holds, so each has a part of the gradient."""
        return _summed(gradient, ctx.group), None


def _summed(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class DivideSequence(nn.Module):
    """[B, S, D] -> [B, S/T, D]: this rank's stretch of the sequence, then `after`."""

    def __init__(self, after: nn.Module, mesh: Mesh) -> None:
        super().__init__()
        self.after = after
        self.mesh = mesh

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Keep a share; the backward pass gathers the gradients of all."""
        x_SBD = x_BSD.transpose(0, 1).contiguous()
        share = mappings.scatter_to_sequence_parallel_region(x_SBD, group=self.mesh.tensor_group)
        return self.after(share.transpose(0, 1).contiguous())


class JoinSequence(nn.Module):
    """[B, S/T] -> [B, S]: the stretches of all ranks, all of which use the whole in the same way."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh

    def forward(self, x_BS: torch.Tensor) -> torch.Tensor:
        """Gather; the backward pass keeps this rank's stretch of the gradient."""
        x_SB = mappings.gather_from_sequence_parallel_region(
            x_BS.transpose(0, 1).contiguous(), tensor_parallel_output_grad=False, group=self.mesh.tensor_group
        )
        return x_SB.transpose(0, 1)


def split_layer(layer: nn.Module, mesh: Mesh, *, sequence_parallel: bool, dtype: torch.dtype) -> None:
    """Replace what the table of splits names inside `layer`, in place, on the current default device.

    Parameters are left uninitialised.
    """
    config = ModelParallelConfig(
        tensor_model_parallel_size=mesh.tensor_size,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
        gradient_accumulation_fusion=False,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
    )
    for name, module in list(layer.named_modules()):
        split = split_of(name)
        if isinstance(split, Heads):
            _divide_heads(name, module, mesh)
        elif is_expert(name) and split is not None:
            layer.set_submodule(name, _share_of_expert(module, split, mesh))
        elif split is not None and not isinstance(split, Whole):
            layer.set_submodule(name, _parallel_twin(module, split, config, mesh))
        if getattr(module, "slopes", ()):
            _divide_slopes(module, mesh)
        if hasattr(module, "tensor_ranks"):
            _divide_experts(module, mesh, sequence_parallel=sequence_parallel)
    _share_vocabulary(layer, mesh, sequence_parallel=sequence_parallel)
    _divide_dropouts(layer, mesh, sequence_parallel=sequence_parallel)


def _parallel_twin(module: nn.Module, split: Split, config: ModelParallelConfig, mesh: Mesh) -> nn.Module:
    """megatron-core's layer for a plain one."""
    common: dict[str, Any] = {"config": config, "init_method": nn.Identity(), "tp_group": mesh.tensor_group}
    if isinstance(module, nn.Embedding):
        return VocabParallelEmbedding(
            rows_allocated(module.num_embeddings, mesh.tensor_size), module.embedding_dim, **common
        )
    assert isinstance(module, nn.Linear), f"{type(module).__name__} cannot be split"
    bias = module.bias is not None
    if isinstance(split, Row):
        return RowLinear(
            module.in_features, module.out_features, bias=bias, input_is_parallel=True, skip_bias_add=False, **common
        )
    assert isinstance(split, Column | Vocabulary)
    rows = module.out_features
    if isinstance(split, Vocabulary):
        rows = rows_allocated(rows, mesh.tensor_size)
    return ColumnLinear(module.in_features, rows, bias=bias, **common)


def _divide_heads(name: str, norm: nn.Module, mesh: Mesh) -> None:
    """Leave a norm of queries and keys the parameters of this rank's heads; statistics of all heads are summed."""
    for kind, parameter in list(norm.named_parameters()):
        if split_dimension(f"{name}.{kind}") is not None:
            heads = parameter.shape[0] // mesh.tensor_size
            setattr(norm, kind, nn.Parameter(parameter.new_empty(heads, *parameter.shape[1:])))
    if hasattr(norm, "sum_over_ranks"):
        norm.sum_over_ranks = lambda x: SumOverRanks.apply(x, mesh.tensor_group)  # type: ignore[assignment]


def _share_of_expert(module: nn.Module, split: Split, mesh: Mesh) -> nn.Linear:
    """A rank's share of a matrix of an expert; the collectives are around all experts together."""
    assert isinstance(module, nn.Linear), f"{type(module).__name__} cannot be split"
    assert module.bias is None, "experts have no biases"
    rows, columns, size = module.out_features, module.in_features, mesh.tensor_size
    shape = (columns // size, rows) if isinstance(split, Row) else (columns, rows // size)
    return nn.Linear(*shape, bias=False)


def _divide_experts(experts: nn.Module, mesh: Mesh, *, sequence_parallel: bool) -> None:
    """Let experts take in the whole sequence and give back the sum over ranks; each rank adds its share of the loss."""
    experts.enter = EnterParts(mesh, sequence_parallel=sequence_parallel)
    experts.leave = LeaveParts(mesh, sequence_parallel=sequence_parallel)
    experts.tensor_ranks = mesh.tensor_size  # type: ignore[assignment]


def _divide_slopes(attention: nn.Module, mesh: Mesh) -> None:
    """Leave an attention the ALiBi slopes of this rank's heads."""
    slopes: tuple[float, ...] = attention.slopes  # type: ignore[assignment]
    heads = len(slopes) // mesh.tensor_size
    attention.slopes = slopes[heads * mesh.tensor_rank : heads * (mesh.tensor_rank + 1)]  # type: ignore[assignment]


def _share_vocabulary(layer: nn.Module, mesh: Mesh, *, sequence_parallel: bool) -> None:
    """Tell an output head which rows of the vocabulary it now holds."""
    rows = getattr(layer, "vocabulary", None)
    if rows is not None:
        shard = ShardedVocabulary.of(rows.size, mesh, sequence_parallel=sequence_parallel)
        layer.vocabulary = shard  # type: ignore[assignment]


def _divide_dropouts(layer: nn.Module, mesh: Mesh, *, sequence_parallel: bool) -> None:
    """Independent masks for divided heads and the divided sequence; divide it after the embedding, join rewards."""
    for name, module in list(layer.named_modules()):
        if name.endswith("attention.core") and module.dropout > 0.0:
            divide_dropout(module, mesh)
        if sequence_parallel and isinstance(module, nn.Dropout) and module.p > 0.0:
            divide_dropout(module, mesh)
    if sequence_parallel and hasattr(layer, "rm_linear"):
        layer.whole_sequence = JoinSequence(mesh)
    if sequence_parallel and hasattr(layer, "word_embeddings"):
        layer.hidden_dropout = DivideSequence(layer.get_submodule("hidden_dropout"), mesh)


def sum_partial_gradients(layer: nn.Module, mesh: Mesh, *, sequence_parallel: bool) -> None:
    """Sum over the tensor ranks the gradients of replicated parameters that each rank applies to a part only.

    Under sequence parallelism these are norms and row biases, which see a stretch of the sequence; always, what a norm
    of queries and keys shares among the divided heads, and a router, whose weights a rank uses for parts of experts.
    The sum is a hook on the parameter, before any engine sees the gradient, and so holds at every ZeRO stage and in
    the pipeline.
    """

    def add_up(gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient, mesh.tensor_group)

    # The embedding divides the sequence only after all its parameters.
    stretches = sequence_parallel and not hasattr(layer, "word_embeddings")
    for name, parameter in layer.named_parameters():
        if split_dimension(name) is not None or not parameter.requires_grad:
            continue
        if stretches or isinstance(split_of(name.rpartition(".")[0]), Heads | Whole):
            parameter.register_hook(add_up)
