"""Between DeepSpeed's partitions and logical tensors: every parameter's weights, fp32 master and moments, whole.

Works the same at every ZeRO stage and tensor-parallel size, which is what makes a checkpoint free of layout.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import pad

from neox.checkpoint.native.store import StoredTensor
from neox.checkpoint.runs import MASTER, RunReader
from neox.model.build import WeightSource
from neox.parallel.splits import join_shards, split_dimension, take_shard
from neox.training.engine import Engine
from neox.training.optimizers.build import state_names
from neox.training.optimizers.sm3 import SM3


def owned_tensors(engine: Engine, *, with_optimizer: bool) -> Iterator[StoredTensor]:
    """Gather every logical tensor of this pipeline stage; yield those this rank is to write.

    A collective over the stage: all its ranks must run through it. Tensors are dealt to the ranks of the stage
    in equal shares of bytes.
    """
    if with_optimizer:
        with plain_moments(engine):
            yield from _owned(engine, with_optimizer=True)
    else:
        yield from _owned(engine, with_optimizer=False)


def _owned(engine: Engine, *, with_optimizer: bool) -> Iterator[StoredTensor]:
    parameters, mesh = without_tied_copy(engine), engine.mesh
    masters = [MASTER] if engine.config.model.precision != "fp32" else []
    total = sum(p.whole_shape.numel() for p in parameters.values())  # type: ignore[attr-defined]
    ranks = mesh.data_size * mesh.tensor_size
    seen = 0
    for name, parameter in parameters.items():
        owner = min(ranks - 1, seen * ranks // total)
        seen += parameter.whole_shape.numel()  # type: ignore[attr-defined]
        mine = owner == mesh.data_rank * mesh.tensor_size + mesh.tensor_rank
        value = _whole(engine, name, parameter, local_weights(engine, parameter), keep=mine)
        if value is not None:
            yield StoredTensor("model", name, value)
        if not with_optimizer or not parameter.requires_grad:
            continue
        for state in (*masters, *moments_of(engine, name)):
            value = _whole(engine, name, parameter, local_state(engine, parameter, state), keep=mine)
            if value is not None:
                yield StoredTensor("optimizer", f"{name}/{state}", value)
        for dimension, vector in enumerate(accumulators(engine, name)):
            value = _whole(engine, name, parameter, vector, keep=mine, dimension=dimension)
            if value is not None:
                yield StoredTensor("optimizer", f"{name}/accumulator_{dimension}", value)


def without_tied_copy(engine: Engine) -> dict[str, nn.Parameter]:
    """A tied embedding lives on the first and on the last stage; the first one saves it."""
    return {
        name: p
        for name, p in engine.parameters().items()
        if engine.mesh.pipe_rank == 0 or not name.startswith("layers.0.")
    }


def trainable(engine: Engine) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer holds."""
    return {name: p for name, p in engine.parameters().items() if p.requires_grad}


def _whole(
    engine: Engine,
    name: str,
    parameter: nn.Parameter,
    local: torch.Tensor,
    *,
    keep: bool,
    dimension: int | None = None,
) -> torch.Tensor | None:
    """The logical tensor on the CPU from every tensor rank's share; None where another rank keeps it.

    With `dimension` it is the accumulator of that dimension, whose other dimensions are 1.
    """
    mesh = engine.mesh
    is_divided = split_dimension(name) is not None and dimension in (None, split_dimension(name))
    if mesh.tensor_size > 1 and is_divided:
        shards = [torch.empty_like(local) for _ in range(mesh.tensor_size)]
        dist.all_gather(shards, local.contiguous(), group=mesh.tensor_group)
    else:
        shards = [local]
    if not keep:
        return None
    groups: tuple[int, ...] = parameter.row_groups  # type: ignore[attr-defined]
    shape: torch.Size = parameter.whole_shape  # type: ignore[attr-defined]
    if dimension is not None:
        shape = torch.Size(size if d == dimension else 1 for d, size in enumerate(shape))
    whole = join_shards(name, shards, shape=shape, groups=groups)
    return whole.detach().to("cpu", copy=True).contiguous()


def local_weights(engine: Engine, parameter: nn.Parameter) -> torch.Tensor:
    """This tensor rank's share of the weights, in the model's dtype."""
    if engine.config.parallel.zero_stage < 3:
        return parameter.data
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def local_state(engine: Engine, parameter: nn.Parameter, state: str) -> torch.Tensor:
    """This tensor rank's share of the master weights or of a moment, fp32."""
    if engine.config.parallel.zero_stage == 0:
        return engine.deepspeed.optimizer.state[parameter][state]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole = safe_get_full_fp32_param(parameter) if state == MASTER else safe_get_full_optimizer_state(parameter, state)
    return whole.view(_local_shape(parameter))


def _local_shape(parameter: nn.Parameter) -> torch.Size:
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape  # type: ignore[return-value]


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The torch optimizer below DeepSpeed's."""
    optimizer = engine.deepspeed.optimizer
    return optimizer if engine.config.parallel.zero_stage == 0 else optimizer.optimizer


def moment_names(engine: Engine) -> list[str]:
    """Everything that the optimizer keeps for each element of some parameter; nothing before its first step."""
    return sorted({state for name in trainable(engine) for state in moments_of(engine, name)})


def moments_of(engine: Engine, name: str) -> tuple[str, ...]:
    """What the optimizer keeps for each element of this parameter; nothing before its first step."""
    has_stepped = any(base_optimizer(engine).state.values())
    return state_names(engine.config.optimizer, name) if has_stepped else ()


@contextmanager
def plain_moments(engine: Engine) -> Iterator[None]:
    """Have the moments where `local_state` finds them, in fp32 even where the optimizer packs them in 8 bits."""
    base = base_optimizer(engine)
    is_packed = engine.config.optimizer.type == "adam8bit"
    if is_packed:
        base.unpack()  # type: ignore[attr-defined]
    if moment_names(engine):
        link_states(engine)
    try:
        yield
    finally:
        if is_packed:
            base.pack()  # type: ignore[attr-defined]
            link_states(engine)


def accumulators(engine: Engine, name: str) -> list[torch.Tensor]:
    """SM3's, by dimension; each has the shape of the parameter's shard with 1 for every dimension but its own."""
    base = base_optimizer(engine)
    if not isinstance(base, SM3):
        return []
    vectors = base.accumulators[name]
    return [vector.view([-1 if d == other else 1 for other in range(len(vectors))]) for d, vector in enumerate(vectors)]


def optimizer_step(engine: Engine) -> int:
    """Adam's step count; 0 for optimizers without one."""
    for state in base_optimizer(engine).state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def restore(engine: Engine, reader: RunReader, *, with_optimizer: bool) -> None:
    """Put a checkpoint's fp32 weights, moments and step count into an engine built from its weights."""
    half = engine.config.model.precision != "fp32"
    if half:
        for name, parameter in _held(engine).items():
            key = f"{name}/{MASTER}"
            source = reader.tensor(key) if key in reader else reader.tensor(name)
            _set_state(engine, parameter, MASTER, _share(engine, name, parameter, source))
    if not with_optimizer:
        return
    if _has_stepped(engine, reader):
        _allocate_states(engine, reader.manifest.progress.optimizer_step)
        for name, parameter in _held(engine).items():
            for state in moments_of(engine, name):
                _set_state(engine, parameter, state, _share(engine, name, parameter, reader.tensor(f"{name}/{state}")))
        _restore_accumulators(engine, reader)
        if engine.config.optimizer.type == "adam8bit":
            base_optimizer(engine).pack()  # type: ignore[attr-defined]
            link_states(engine)


def _has_stepped(engine: Engine, reader: RunReader) -> bool:
    """Whether there are states: a checkpoint from before the first update has none, the optimizer makes its own."""
    settings = engine.config.optimizer
    return any(
        f"{name}/{state}" in reader
        for name in trainable(engine)
        for state in (*state_names(settings, name), "accumulator_0")
    )


def _held(engine: Engine) -> dict[str, nn.Parameter]:
    """The parameters of which this rank updates a part: under ZeRO 1 and 2 few, so that few are read."""
    return {name: p for name, p in trainable(engine).items() if getattr(p, "_hp_mapping", p) is not None}


def _restore_accumulators(engine: Engine, reader: RunReader) -> None:
    """SM3's, which every rank has of every parameter."""
    for name, parameter in trainable(engine).items():
        for dimension, vector in enumerate(accumulators(engine, name)):
            whole = reader.tensor(f"{name}/accumulator_{dimension}")
            vector.copy_(_share(engine, name, parameter, whole) if dimension == split_dimension(name) else whole)


def _share(engine: Engine, name: str, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
    mesh, groups = engine.mesh, parameter.row_groups  # type: ignore[attr-defined]
    shard = take_shard(name, whole, rank=mesh.tensor_rank, size=mesh.tensor_size, groups=groups)
    return shard.to(mesh.device, torch.float32)


def _set_state(engine: Engine, parameter: nn.Parameter, state: str, value: torch.Tensor) -> None:
    if engine.config.parallel.zero_stage == 0:
        engine.deepspeed.optimizer.state[parameter][state].copy_(value)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.contiguous()
    if engine.config.parallel.zero_stage == 3 and value.numel() % engine.mesh.data_size:
        # Where the ranks do not divide it, DeepSpeed 0.19.8 takes a part only, and not the whole.
        key = None if state == MASTER else state
        engine.deepspeed.optimizer.set_local_hp_param(_padded_part(parameter, value), parameter, key)
    elif state == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, state)


def _padded_part(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a value, flat: ZeRO 3 pads the end and cuts it into equal parts."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    rank = dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    return pad(value.flatten(), (0, size * (rank + 1) - value.numel()))[size * rank :]


def _allocate_states(engine: Engine, step: int) -> None:
    """Give the optimizer the tensors it would make at its first step, so that they can be filled."""
    base, settings = base_optimizer(engine), engine.config.optimizer
    for flat, is_orthogonal in _optimized_tensors(engine):
        states = state_names(settings, is_orthogonal=is_orthogonal)
        entry: dict[str, Any] = {state: torch.zeros_like(flat, requires_grad=False) for state in states}
        if "exp_avg_sq" in states or "grad_sum_sq" in states:
            is_fused = isinstance(base, torch.optim.AdamW) and base.defaults["fused"]
            entry["step"] = torch.tensor(float(step), device=flat.device if is_fused else "cpu")
        if entry:
            base.state[flat] = entry
    link_states(engine)


def link_states(engine: Engine) -> None:
    """Point DeepSpeed's per-parameter views at the optimizer's tensors.

    ZeRO 1 and 2 do this themselves once, right after the first parameter group's first update, when the states of
    the other groups do not exist yet, and so miss them (seen with DeepSpeed 0.19.8).
    """
    if engine.config.parallel.zero_stage in (1, 2):
        optimizer = engine.deepspeed.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _optimized_tensors(engine: Engine) -> Iterable[tuple[torch.Tensor, bool]]:
    """What the torch optimizer sees as its parameters, ours at ZeRO 0, flat fp32 partitions above; and if Muon's."""
    if engine.config.parallel.zero_stage == 3:
        return [(flat, False) for flat in engine.deepspeed.optimizer.fp32_partitioned_groups_flat]
    groups = base_optimizer(engine).param_groups
    return [(p, bool(group.get("orthogonal"))) for group in groups for p in group["params"]]


def overwrite_weights(engine: Engine, source: WeightSource) -> None:
    """Give an engine that has been in use the weights that it could have been built from; masters are the same.

    A collective; other states stay.
    """
    for name, parameter in engine.parameters().items():
        share = _share(engine, name, parameter, source(name, parameter.whole_shape))  # type: ignore[attr-defined]
        _set_weights(engine, parameter, share)
        if parameter.requires_grad and engine.config.parallel.zero_stage > 0 and name in _held(engine):
            _set_state(engine, parameter, MASTER, share.to(parameter.dtype).float())


def _set_weights(engine: Engine, parameter: nn.Parameter, share: torch.Tensor) -> None:
    if engine.config.parallel.zero_stage < 3:
        parameter.data.copy_(share)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(share)


def forget_optimizer(engine: Engine) -> None:
    """Put the optimizer where it was before its first step."""
    base = base_optimizer(engine)
    base.state.clear()
    if isinstance(base, SM3):
        for vectors in base.accumulators.values():
            torch._foreach_zero_(vectors)
    if engine.config.parallel.zero_stage in (1, 2):
        engine.deepspeed.optimizer._hp_optimizer_states_linked = False
