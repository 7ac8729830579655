"""The state of DeepSpeed's optimizers as their files keep it: plain, with fp32 masters, and partitioned by ZeRO.

    plain        {state: {number: {step, exp_avg, exp_avg_sq}}, param_groups}; parameters are numbered group by group
    fp16         the same in `optimizer_state_dict`, and the masters: `fp32_groups` one by one, or `fp32_groups_flat`,
                 where a group is one vector and has one number
    ZeRO 1, 2    each data-parallel rank has a stretch of every group's vector; `param_slice_mappings` says whose
                 elements are where. Also the bf16 optimizer
    ZeRO 3       each rank has its share of every parameter, rounded up, one after another in vectors of many parameters

Sources: deepspeed/runtime/fp16/fused_optimizer.py and unfused_optimizer.py, runtime/bf16_optimizer.py,
runtime/zero/stage_1_and_2.py and stage3.py, utils/zero_to_fp32.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from neox.checkpoint.upstream.parts import Flat, Fragments, Part, as_part, covers, is_tensor
from neox.errors import CheckpointError

MASTER = "master"
NO_STATE = "set no_load_optim: true to start with a fresh one"

Pieces = tuple[tuple[Flat, int, int], ...]
Shapes = Mapping[str, torch.Size]


@dataclass
class RankStates:
    """What one rank of the model-parallel group has of the optimizer.

    Attributes:
        step: updates made, as Adam counts them.
        states: state (`master`, `exp_avg`, ...) -> name of the parameter, as the caller or the file gives it -> part.
    """

    step: int = 0
    states: dict[str, dict[str, Part]] = field(default_factory=dict)

    def add(self, state: str, name: str, part: Part) -> None:
        """Enter the part of a parameter."""
        self.states.setdefault(state, {})[name] = part


def group_sizes(saved: Mapping[str, Any]) -> tuple[list[int], bool]:
    """Sizes of the parameter groups of an optimizer without ZeRO; counted in elements if the second value says so."""
    if "fp32_groups_flat" in saved:
        return [as_part(vector).shape.numel() for vector in saved["fp32_groups_flat"]], True
    if "fp32_groups" in saved:
        return [len(group) for group in saved["fp32_groups"]], False
    return [len(group["params"]) for group in saved["param_groups"]], False


def plain_states(saved: Mapping[str, Any], groups: Sequence[Shapes], source: object) -> RankStates:
    """State without ZeRO.

    Args:
        saved: `optimizer` in the file of a rank.
        groups: names and shapes of the parameters of each group, in order.
        source: for errors.

    Raises:
        CheckpointError: it is not the state of these parameters.
    """
    found = RankStates()
    inner = saved.get("optimizer_state_dict", saved)
    numbers = [list(group["params"]) for group in inner["param_groups"]]
    if "fp32_groups_flat" in saved:
        vectors = {MASTER: [as_part(vector) for vector in saved["fp32_groups_flat"]]}
        vectors |= _vectors(inner, len(numbers), found, source)
        for state, by_group in vectors.items():
            for vector, shapes in zip(by_group, groups, strict=True):
                _enter(found, state, _consecutive(shapes, [vector]), shapes, source)
        return found
    for number_list, shapes in zip(numbers, groups, strict=True):
        for number, (name, shape) in zip(number_list, shapes.items(), strict=True):
            for state, value in _state_of(inner, number, found).items():
                _check(as_part(value).shape == shape, name, source)
                found.add(state, name, as_part(value))
    for masters, shapes in zip(saved.get("fp32_groups", ()), groups, strict=False):
        for value, (name, shape) in zip(masters, shapes.items(), strict=True):
            _check(as_part(value).shape == shape, name, source)
            found.add(MASTER, name, as_part(value))
    return found


def zero_states(state: Mapping[str, Any], partitions: Sequence[Mapping[str, Any]], source: object) -> RankStates:
    """State that ZeRO has partitioned.

    Args:
        state: the file of the rank that has `param_shapes`.
        partitions: what each data-parallel rank has.
        source: for errors.

    Raises:
        CheckpointError: it is in the form of a version of DeepSpeed that cannot be read, or a part is missing.
    """
    found = RankStates()
    if "fp32_flat_groups" in partitions[0]:
        count = len(partitions[0]["fp32_flat_groups"])
        by_rank = [
            _with_masters(partition, "fp32_flat_groups", partition["optimizer_state_dict"], count, found, source=source)
            for partition in partitions
        ]
        shapes = merged_shapes(state)
        for name_of_state in by_rank[0]:
            pieces = _shares(shapes, [vectors[name_of_state] for vectors in by_rank])
            _enter(found, name_of_state, pieces, shapes, source)
        return found
    key = "single_partition_of_fp32_groups"
    groups, is_dealt = state.get("param_shapes"), _is_dealt(state)
    if key not in partitions[0] or not groups:
        raise CheckpointError(f"{source}: its optimizer state is of a DeepSpeed before 0.5; {NO_STATE}")
    by_rank = [_with_masters(p, key, p["base_optimizer_state"], len(groups), found, source=source) for p in partitions]
    for name_of_state in by_rank[0]:
        for number, shapes in enumerate(groups):
            vectors = [rank[name_of_state][number] for rank in by_rank]
            # With `round_robin_gradients` the order of `param_shapes` is the one of the vectors, and the mappings are
            # made as if it were another, which also gives wrong masters within DeepSpeed 0.19.8.
            pieces = {} if is_dealt else _mapped(number, partitions, vectors)
            pieces = pieces or _consecutive(shapes, vectors)
            _enter(found, name_of_state, pieces, shapes, source)
    return found


def zero3_weights(
    state: Mapping[str, Any], partitions: Sequence[Mapping[str, Any]], dtype: torch.dtype, source: object
) -> dict[str, Part]:
    """Weights of a rank under ZeRO 3, which are the optimizer's masters.

    Raises:
        CheckpointError: the files of the optimizer are missing.
    """
    if not partitions:
        raise CheckpointError(f"{source}: the *_optim_states.pt with its weights are missing; copy the whole folder")
    if state.get("frozen_param_shapes"):
        raise CheckpointError(f"{source}: has frozen parameters under ZeRO 3, which cannot be read; save it at ZeRO 2")
    shapes = merged_shapes(state)
    vectors = [[as_part(vector) for vector in partition["fp32_flat_groups"]] for partition in partitions]
    found = RankStates()
    _enter(found, MASTER, _shares(shapes, vectors), shapes, source, dtype=dtype)
    return found.states[MASTER]


def merged_shapes(state: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Shapes of all parameters that the optimizer has, in order."""
    return {name: torch.Size(shape) for group in state.get("param_shapes") or () for name, shape in group.items()}


def scaler_fields(saved: Mapping[str, Any]) -> dict[str, float]:
    """The loss scale and its counters, from wherever an optimizer keeps them."""
    scaler = getattr(saved.get("loss_scaler"), "state", None)
    values = scaler if isinstance(scaler, dict) else saved
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return {name: values[name] for name in names if isinstance(values.get(name), int | float)}


def _with_masters(
    partition: Mapping[str, Any], key: str, inner: Any, count: int, found: RankStates, *, source: object
) -> dict[str, list[Flat]]:
    """Vectors of every state of one data-parallel rank."""
    return {MASTER: [as_part(vector) for vector in partition[key]]} | _vectors(inner, count, found, source)


def _vectors(inner: Any, count: int, found: RankStates, source: object) -> dict[str, list[Flat]]:
    """Vectors of an optimizer that has one for each group, by state; nothing before its first step.

    Raises:
        CheckpointError: some groups have state and others do not, so what there is would be passed over.
    """
    if isinstance(inner, list):  # `elastic_checkpoint`
        entries = inner
    else:
        numbers = [number for group in inner["param_groups"] for number in group["params"]]
        entries = [_state_of(inner, number, found) for number in numbers]
    if not any(entries):
        return {}
    if len(entries) != count or not all(entries):
        some = sum(map(bool, entries))
        raise CheckpointError(f"{source}: its optimizer state is that of {some} of {count} groups; {NO_STATE}")
    for entry in entries:
        found.step = max(found.step, _number(entry.get("step", 0)))
    return {
        state: [as_part(entry[state]) for entry in entries]
        for state, value in entries[0].items()
        if is_tensor(value) and len(value.shape)
    }


def _state_of(inner: Mapping[str, Any], number: int, found: RankStates) -> dict[str, Any]:
    """The tensors kept of a numbered parameter; its step is taken note of.

    DeepSpeed's fused Adam counts only on the last parameter of a group, or on the group.
    """
    entry = inner["state"].get(number, {})
    steps = [entry.get("step", 0), *(group.get("step", 0) for group in inner["param_groups"])]
    found.step = max(found.step, *map(_number, steps))
    return {state: value for state, value in entry.items() if is_tensor(value) and state != "step"}


def _number(value: Any) -> int:
    return int(as_part(value).read()) if is_tensor(value) else int(value)


def _is_dealt(state: Mapping[str, Any]) -> bool:
    """Whether parameters lie in another order than that of the modules."""
    settings = (state.get("ds_config") or {}).get("zero_optimization") or {}
    return bool(settings.get("round_robin_gradients"))


def _mapped(group: int, partitions: Sequence[Mapping[str, Any]], vectors: Sequence[Flat]) -> dict[str, Pieces]:
    """Where the elements of each parameter are, as DeepSpeed has written down; empty before it did."""
    found: dict[str, Pieces] = {}
    for partition, vector in zip(partitions, vectors, strict=True):
        mappings = partition.get("param_slice_mappings")
        for name, address in mappings[group].items() if mappings else ():
            piece = (vector, int(address.state["start"]), int(address.state["numel"]))
            found[name] = (*found.get(name, ()), piece)
    return found


def _consecutive(shapes: Shapes, vectors: Sequence[Flat]) -> dict[str, Pieces]:
    """Where they are if they lie one after another in the stretches of all ranks, of which the last may be cut."""
    found, position, stretch = {}, 0, vectors[0].shape.numel()
    for name, shape in shapes.items():
        end = position + shape.numel()
        pieces = []
        for rank, vector in enumerate(vectors):
            first, last = max(position, rank * stretch), min(end, (rank + 1) * stretch)
            if first < last:
                pieces.append((vector, first - rank * stretch, last - first))
        found[name], position = tuple(pieces), end
    return found


def _shares(shapes: Shapes, vectors: Sequence[Sequence[Flat]]) -> dict[str, Pieces]:
    """Where they are under ZeRO 3: every rank has its share, rounded up, and the last ones what is left."""
    found, group, position = {}, 0, 0
    for name, shape in shapes.items():
        count = shape.numel()
        share = math.ceil(count / len(vectors))
        while group + 1 < len(vectors[0]) and position == vectors[0][group].shape.numel():
            group, position = group + 1, 0
        sizes = [max(0, min(share, count - rank * share)) for rank in range(len(vectors))]
        found[name] = tuple((rank[group], position, size) for rank, size in zip(vectors, sizes, strict=True) if size)
        position += share
    return found


def _enter(
    found: RankStates,
    state: str,
    pieces: Mapping[str, Pieces],
    shapes: Shapes,
    source: object,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    for name, shape in shapes.items():
        _check(name in pieces and covers(pieces[name], shape), name, source)
        found.add(state, name, Fragments(pieces[name], torch.Size(shape), dtype))


def _check(fits: bool, name: str, source: object) -> None:
    if not fits:
        raise CheckpointError(f"{source}: its optimizer state does not fit parameter {name}; {NO_STATE}")
