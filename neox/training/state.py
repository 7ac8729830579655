"""Between DeepSpeed's partitions and logical tensors: every parameter's weights, fp32 master and moments, whole.

Works the same at every ZeRO stage and tensor-parallel size, which is what makes a checkpoint free of layout.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neox.checkpoint.native import NativeReader, StoredTensor
from neox.errors import CheckpointError
from neox.parallel.splits import join_shards, split_dimension, take_shard
from neox.training.engine import Engine

MASTER = "master"


def owned_tensors(engine: Engine, *, with_optimizer: bool) -> Iterator[StoredTensor]:
    """Gather every logical tensor of this pipeline stage; yield those this rank is to write.

    A collective over the stage: all its ranks must run through it. Tensors are dealt to the ranks of the stage
    in equal shares of bytes.
    """
    parameters = _without_tied_copy(engine)
    states = moment_names(engine) if with_optimizer else []
    if states:
        _link_states(engine)
    if with_optimizer and engine.config.model.precision != "fp32":
        states = [MASTER, *states]
    mesh = engine.mesh
    total = sum(p.whole_shape.numel() for p in parameters.values())  # type: ignore[attr-defined]
    ranks = mesh.data_size * mesh.tensor_size
    seen = 0
    for name, parameter in parameters.items():
        owner = min(ranks - 1, seen * ranks // total)
        seen += parameter.whole_shape.numel()  # type: ignore[attr-defined]
        mine = owner == mesh.data_rank * mesh.tensor_size + mesh.tensor_rank
        value = _whole(engine, name, parameter, _weights(engine, parameter), keep=mine)
        if value is not None:
            yield StoredTensor("model", name, value)
        for state in states:
            value = _whole(engine, name, parameter, _state(engine, parameter, state), keep=mine)
            if value is not None:
                yield StoredTensor("optimizer", f"{name}/{state}", value)


def _without_tied_copy(engine: Engine) -> dict[str, nn.Parameter]:
    """A tied embedding lives on the first and on the last stage; the first one saves it."""
    return {
        name: p
        for name, p in engine.parameters().items()
        if engine.mesh.pipe_rank == 0 or not name.startswith("layers.0.")
    }


def _whole(
    engine: Engine, name: str, parameter: nn.Parameter, local: torch.Tensor, *, keep: bool
) -> torch.Tensor | None:
    """The logical tensor on the CPU from every tensor rank's share; None where another rank keeps it."""
    mesh = engine.mesh
    if mesh.tensor_size > 1 and split_dimension(name) is not None:
        shards = [torch.empty_like(local) for _ in range(mesh.tensor_size)]
        dist.all_gather(shards, local.contiguous(), group=mesh.tensor_group)
    else:
        shards = [local]
    if not keep:
        return None
    whole = join_shards(name, shards, shape=parameter.whole_shape)  # type: ignore[attr-defined]
    return whole.detach().to("cpu", copy=True).contiguous()


def _weights(engine: Engine, parameter: nn.Parameter) -> torch.Tensor:
    """This tensor rank's share of the weights, in the model's dtype."""
    if engine.config.parallel.zero_stage < 3:
        return parameter.data
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def _state(engine: Engine, parameter: nn.Parameter, state: str) -> torch.Tensor:
    """This tensor rank's share of the master weights or of a moment, fp32."""
    if engine.config.parallel.zero_stage == 0:
        return engine.deepspeed.optimizer.state[parameter][state]
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole = safe_get_full_fp32_param(parameter) if state == MASTER else safe_get_full_optimizer_state(parameter, state)
    return whole.view(_local_shape(parameter))


def _local_shape(parameter: nn.Parameter) -> torch.Size:
    return parameter.ds_shape if hasattr(parameter, "ds_shape") else parameter.shape  # type: ignore[return-value]


def _base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The torch optimizer below DeepSpeed's."""
    optimizer = engine.deepspeed.optimizer
    return optimizer if engine.config.parallel.zero_stage == 0 else optimizer.optimizer


def moment_names(engine: Engine) -> list[str]:
    """The tensors the optimizer keeps per parameter; empty before its first step."""
    for state in _base_optimizer(engine).state.values():
        return sorted(key for key, value in state.items() if torch.is_tensor(value) and value.numel() > 1)
    return []


def optimizer_step(engine: Engine) -> int:
    """Adam's step count; 0 for optimizers without one."""
    for state in _base_optimizer(engine).state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def restore(engine: Engine, reader: NativeReader, *, with_optimizer: bool) -> None:
    """Put a checkpoint's fp32 weights, moments and step count into an engine built from its weights.

    Raises:
        CheckpointError: if optimizer state is wanted and the checkpoint was made by another optimizer or has none.
    """
    half = engine.config.model.precision != "fp32"
    if half:
        for name, parameter in engine.parameters().items():
            key = f"{name}/{MASTER}"
            source = reader.tensor(key) if key in reader else reader.tensor(name)
            _set_state(engine, parameter, MASTER, _share(engine, name, source))
    if not with_optimizer:
        return
    states = _saved_states(engine, reader)
    _allocate_states(engine, states, reader.manifest.progress.optimizer_step)
    for name, parameter in engine.parameters().items():
        for state in states:
            _set_state(engine, parameter, state, _share(engine, name, reader.tensor(f"{name}/{state}")))


def _saved_states(engine: Engine, reader: NativeReader) -> list[str]:
    saved, wanted = reader.manifest.optimizer, engine.config.optimizer.type
    if saved is None:
        raise CheckpointError(
            f"{reader.folder}: has no optimizer state; set no_load_optim: true to start with a fresh one"
        )
    adams = {"adam", "adamw"}
    if saved != wanted and not {saved, wanted} <= adams:
        raise CheckpointError(
            f"{reader.folder}: was trained with optimizer {saved}, the configuration asks for {wanted}; "
            "set no_load_optim: true to start with a fresh one"
        )
    states = {key.rpartition("/")[2] for key in reader.manifest.tensors if key.startswith("layers.") and "/" in key}
    return sorted(states - {MASTER})


def _share(engine: Engine, name: str, whole: torch.Tensor) -> torch.Tensor:
    mesh = engine.mesh
    return take_shard(name, whole, rank=mesh.tensor_rank, size=mesh.tensor_size).to(mesh.device, torch.float32)


def _set_state(engine: Engine, parameter: nn.Parameter, state: str, value: torch.Tensor) -> None:
    if engine.config.parallel.zero_stage == 0:
        engine.deepspeed.optimizer.state[parameter][state].copy_(value)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    value = value.contiguous()
    if state == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, state)


def _allocate_states(engine: Engine, states: list[str], step: int) -> None:
    """Give the optimizer the tensors it would make at its first step, so that they can be filled.

    A checkpoint from before the first update has none; the optimizer then makes its own.
    """
    if not states:
        return
    base = _base_optimizer(engine)
    for flat in _optimized_tensors(engine):
        entry: dict[str, Any] = {state: torch.zeros_like(flat, requires_grad=False) for state in states}
        if isinstance(base, torch.optim.AdamW):
            entry["step"] = torch.tensor(float(step), device=flat.device if base.defaults["fused"] else "cpu")
        base.state[flat] = entry
    _link_states(engine)


def _link_states(engine: Engine) -> None:
    """Point DeepSpeed's per-parameter views at the optimizer's tensors.

    ZeRO 1 and 2 do this themselves once, right after the first parameter group's first update, when the states of
    the other groups do not exist yet, and so miss them (seen with DeepSpeed 0.19.8).
    """
    if engine.config.parallel.zero_stage in (1, 2):
        optimizer = engine.deepspeed.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _optimized_tensors(engine: Engine) -> Iterable[torch.Tensor]:
    """What the torch optimizer sees as its parameters: ours at ZeRO 0, flat fp32 partitions above."""
    if engine.config.parallel.zero_stage == 3:
        return engine.deepspeed.optimizer.fp32_partitioned_groups_flat
    return [p for group in _base_optimizer(engine).param_groups for p in group["params"]]
