"""Layers with memory and weights: built on the meta device, divided, then filled one tensor at a time."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from neox.config import Config, LoraConfig, ModelConfig
from neox.errors import CheckpointError
from neox.model.init import initial_tensor
from neox.model.layers import EMBEDDING_INDEX, Decoder, LayerSpec, layer_list
from neox.model.lora import add_factors, with_fresh_factors
from neox.model.norms import NORMS
from neox.model.positions import RotaryEmbedding
from neox.model.shapes import shapes_only
from neox.parallel.mesh import Mesh
from neox.parallel.splits import row_groups, split_dimension, take_shard

WeightSource = Callable[[str, torch.Size], torch.Tensor]
"""Gives the whole logical tensor of a canonical name and shape, on the CPU, in any floating dtype."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}
WEIGHT_DTYPES = (torch.float64, *DTYPES.values())
SINGLE = Mesh()


def fresh_weights(config: Config) -> WeightSource:
    """Initial weights of a run, the same at every layout."""
    weights = partial(initial_tensor, config=config.model, seed=config.training.seed)
    return with_fresh_factors(weights, seed=config.training.seed)


def build_layer(
    spec: LayerSpec,
    *,
    model: ModelConfig,
    source: WeightSource,
    mesh: Mesh = SINGLE,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype | None = None,
    tied: bool = False,
    lora: LoraConfig | None = None,
) -> nn.Module:
    """Make one layer on `mesh.device`, this rank's share of it, with weights from `source`.

    Returns:
        The layer, its parameters in `dtype`, those of norms in `norm_dtype` where that is given, and each carrying its
        canonical name and whole shape.
    """
    with shapes_only():
        layer = spec.build()
        shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
        if mesh.tensor_size > 1:
            from neox.parallel.tensor import split_layer

            split_layer(layer, mesh, sequence_parallel=sequence_parallel, dtype=dtype)
        if lora is not None:
            shapes |= add_factors(layer, lora, shapes=shapes, mesh=mesh, sequence_parallel=sequence_parallel)
    _cast(layer, dtype, norm_dtype or dtype).to_empty(device=mesh.device)
    for name, parameter in layer.named_parameters():
        canonical = canonical_name(spec, name, tied=tied)
        whole = source(canonical, shapes[name])
        groups = row_groups(canonical, model)
        shard = take_shard(canonical, whole, rank=mesh.tensor_rank, size=mesh.tensor_size, groups=groups)
        with torch.no_grad():
            parameter.copy_(in_dtype(canonical, shard, parameter.dtype))
        label_parameter(parameter, canonical, shapes[name], groups, mesh)
    for module in layer.modules():
        if isinstance(module, RotaryEmbedding):
            module.reset_buffers(mesh.device)
            module.to(dtype)
    if mesh.tensor_size > 1:
        from neox.parallel.tensor import sum_partial_gradients

        sum_partial_gradients(layer, mesh, sequence_parallel=sequence_parallel)
    return layer


def in_dtype(name: str, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights in another type. Infinities and NaN that were there before are kept.

    Args:
        name: of the parameter, for errors.
        weights: in any floating type, on the CPU.
        dtype: fp16, bf16, fp32 or fp64.

    Raises:
        CheckpointError: they are of a type that means nothing without scales, such as an 8-bit float, or `dtype` cannot
            hold one of them.
    """
    if weights.dtype == dtype:
        return weights
    if weights.dtype not in WEIGHT_DTYPES:
        kind = str(weights.dtype).removeprefix("torch.")
        raise CheckpointError(f"{name}: is of type {kind}, as in quantised models; use the model in bf16, fp16 or fp32")
    result = weights.to(dtype)
    largest = torch.finfo(dtype).max
    if largest < torch.finfo(weights.dtype).max and not all(map(torch.isfinite, _bounds(result))):
        lost = weights[result.isinf() & weights.isfinite()]
        if lost.numel():
            raise CheckpointError(
                f"{name}: holds {float(lost.abs().max()):.6g}, and the largest number of "
                f"{str(dtype).removeprefix('torch.')} is {largest:.6g}; choose a precision with a wider range"
            )
    return result


def _bounds(numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Smallest and largest number, NaN where there is one; without memory of the size of the tensor."""
    return tuple(torch.aminmax(numbers)) if numbers.numel() else ()


def _cast(layer: nn.Module, dtype: torch.dtype, norm_dtype: torch.dtype) -> nn.Module:
    layer.to(dtype)
    for module in layer.modules():
        if isinstance(module, NORMS):
            module.to(norm_dtype)
    return layer


def layer_builder(config: Config, mesh: Mesh, source: WeightSource) -> Callable[[LayerSpec], nn.Module]:
    """`build_layer` for the layers of a run on this rank."""
    return partial(
        build_layer,
        model=config.model,
        source=source,
        mesh=mesh,
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=DTYPES[config.model.precision],
        tied=not config.model.no_weight_tying,
        lora=config.lora if config.lora.is_on else None,
    )


def canonical_name(spec: LayerSpec, name: str, *, tied: bool) -> str:
    """`layers.<disk index>.<name>`; the matrix of a tied head is the embedding's, wherever it lives."""
    if tied and name == "final_linear.weight":
        return f"layers.{EMBEDDING_INDEX}.word_embeddings.weight"
    return f"layers.{spec.disk_index}.{name}"


def label_parameter(parameter: nn.Parameter, name: str, shape: torch.Size, groups: tuple[int, ...], mesh: Mesh) -> None:
    """Write on a parameter what must be known of it whatever engine later renames it.

    That is its canonical name, its whole shape, the groups of its rows (see `row_groups`), and
    `tensor_model_parallel`, by which DeepSpeed counts every part of a gradient's norm once.
    """
    parameter.canonical_name = name  # type: ignore[attr-defined]
    parameter.whole_shape = shape  # type: ignore[attr-defined]
    parameter.row_groups = groups  # type: ignore[attr-defined]
    sharded = mesh.tensor_size > 1 and split_dimension(name) is not None
    parameter.tensor_model_parallel = sharded  # type: ignore[attr-defined]


def build_decoder(
    config: ModelConfig,
    *,
    source: WeightSource,
    mesh: Mesh = SINGLE,
    sequence_parallel: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """Make the whole model in this process, or this tensor rank's share of it, to be read from and not trained.

    Its norms keep their parameters in fp32 at least, as GPT-NeoX's do outside of training.
    """
    layers = [
        build_layer(
            spec,
            model=config,
            source=source,
            mesh=mesh,
            sequence_parallel=sequence_parallel,
            dtype=dtype,
            norm_dtype=torch.promote_types(dtype, torch.float32),
            tied=not config.no_weight_tying,
        )
        for spec in layer_list(config)
    ]
    return Decoder(config, layers=layers)


def meta_decoder(config: ModelConfig) -> Decoder:
    """The model without memory: names, shapes and counts of any size at no cost."""
    with shapes_only():
        return Decoder(config)
