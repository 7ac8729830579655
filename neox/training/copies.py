"""What this rank holds that others hold too, and what can be told from its fingerprints about a rank that differs.

Copies of a parameter's weights lie on the data-parallel ranks (below ZeRO 3), on the tensor-parallel ranks where the
parameter is not divided, and on the first and last pipeline stage where the embedding is tied. At ZeRO 0 there are as
many of the optimizer's state. Above it every rank has a part of the fp32 master weights, which the weights are a
rounding of: that is one copy more, spread over the data-parallel ranks.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

import torch
from torch import nn

from neox.parallel.mesh import Mesh
from neox.parallel.splits import split_dimension
from neox.training.engine import Engine
from neox.training.fingerprint import fingerprint, odd_number, wrapped
from neox.training.state import accumulators, base_optimizer

WEIGHTS, MASTER, GATHERED = "weights", "master", "gathered weights"


class Among(Flag):
    """Who must have the same: ranks that differ along an axis only, or the weights and the rounded masters of a rank.

    `OWN` is the stretch of the weights that a rank has the master of.
    """

    DATA = auto()
    TENSOR = auto()
    STAGES = auto()
    MASTERED = auto()
    MASTERS = auto()
    OWN = auto()


SUMS = tuple(among for among in Among if among is not Among.OWN)
NOBODY = Among(0)
TIED = "layers.0.word_embeddings.weight"


@dataclass(frozen=True)
class Held:
    """A tensor that is compared.

    Attributes:
        name: canonical name of its parameter.
        kind: what of it, `weights` or `exp_avg` say.
        values: flat or not.
        among: with whom.
        shard: tensor rank whose share it is of what is divided over tensor ranks.
        part: data rank whose part it is of what is cut into parts.
        start: place of the first element in the parameter as this tensor rank has it.
    """

    name: str
    kind: str
    values: torch.Tensor
    among: Among
    shard: int | None = None
    part: int | None = None
    start: int = 0

    @property
    def key(self) -> str:
        """The same for all ranks that hold a copy."""
        return f"{self.name} {self.kind} {self.shard} {self.part}"


def held(engine: Engine) -> Iterator[Held]:
    """Everything to compare on this rank; all ranks of a pipeline stage find the same kinds of things."""
    stage = engine.config.parallel.zero_stage
    of_parameter = {0: _unpartitioned, 3: _divided}.get(stage, _partitioned)
    for name, parameter in engine.parameters().items():
        yield from of_parameter(engine, name, parameter)
        for dimension, vector in enumerate(accumulators(engine, name)):
            shard = engine.mesh.tensor_rank if split_dimension(name) == dimension else None
            among = Among.DATA | (_among_tensor_ranks(engine.mesh) if shard is None else NOBODY)
            yield Held(name, f"accumulator_{dimension}", vector, among, shard)


def _unpartitioned(engine: Engine, name: str, parameter: nn.Parameter) -> Iterator[Held]:
    """ZeRO 0: everything is whole on every data rank."""
    shard, among = _shard_and_copies(engine, name)
    among |= Among.DATA
    yield Held(name, WEIGHTS, parameter.data, among, shard)
    for kind, value in sorted(base_optimizer(engine).state.get(parameter, {}).items()):
        if isinstance(value, torch.Tensor):
            yield Held(name, kind, value, among, shard)


def _partitioned(engine: Engine, name: str, parameter: nn.Parameter) -> Iterator[Held]:
    """ZeRO 1 and 2, and DeepSpeed's bf16 optimizer: whole weights, a part of some parameters' masters and moments."""
    mapping, weights = getattr(parameter, "_hp_mapping", None), parameter.data.view(-1)
    shard, among = _shard_and_copies(engine, name)
    mastered = Among.MASTERED if parameter.requires_grad else NOBODY
    yield Held(name, WEIGHTS, weights, among | Among.DATA | mastered, shard)
    if mapping is None:
        return
    stretch, place = mapping.lp_fragment_address, mapping.hp_fragment_address
    own, rounded = weights[stretch.start :][: stretch.numel], mapping.hp_fragment.to(weights.dtype)
    yield Held(name, WEIGHTS, own, Among.OWN, shard, start=stretch.start)
    yield Held(name, WEIGHTS, rounded, Among.MASTERS, shard, start=stretch.start)
    if Among.TENSOR in among:
        flat = base_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
        for kind, value in _states(engine, flat).items():
            fragment = value.view(-1)[place.start :][: place.numel]
            yield Held(name, kind, fragment, Among.TENSOR, part=engine.mesh.data_rank, start=stretch.start)


def _divided(engine: Engine, name: str, parameter: Any) -> Iterator[Held]:
    """ZeRO 3: a part of everything; small parameters are whole beside that. What is on a drive is left there."""
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    shard, among = _shard_and_copies(engine, name)
    part = engine.mesh.data_rank
    if parameter.ds_persist and parameter.data.numel() == parameter.ds_numel:
        yield Held(name, GATHERED, parameter.data, among | Among.DATA, shard)
    if parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme:
        return
    start = parameter.ds_tensor.numel() * part
    real = max(0, min(parameter.ds_tensor.numel(), parameter.ds_numel - start))  # the rest fills up the last part
    weights, states = parameter.ds_tensor.view(-1)[:real], _states_of_stage_3(engine, parameter)
    mastered = Among.MASTERED if states else NOBODY
    yield Held(name, WEIGHTS, weights, among | mastered, shard, part, start)
    for kind, value in states.items():
        if kind == MASTER:
            yield Held(name, WEIGHTS, value[:real].to(weights.dtype), Among.MASTERS, shard, part, start)
        if among:
            yield Held(name, kind, value[:real], among, shard, part, start)


def _states_of_stage_3(engine: Engine, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    """This rank's part of a parameter's master and moments; nothing where they are kept on a drive."""
    optimizer = engine.deepspeed.optimizer
    if not parameter.requires_grad or getattr(optimizer, "swap_optimizer", False):
        return {}
    group, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return {kind: value.view(-1)[start : start + size] for kind, value in _states(engine, flat).items()}


def _states(engine: Engine, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """A flat partition of masters and the optimizer's state of it, except moments packed in blocks of elements."""
    state = base_optimizer(engine).state.get(flat, {})
    return {MASTER: flat} | {
        kind: value
        for kind, value in sorted(state.items())
        if isinstance(value, torch.Tensor) and value.shape == flat.shape and value.is_floating_point()
    }


def _shard_and_copies(engine: Engine, name: str) -> tuple[int | None, Among]:
    """The tensor rank where a parameter is divided, and the ranks beside data-parallel ones that have copies of it."""
    mesh = engine.mesh
    is_tied = mesh.pipe_size > 1 and not engine.config.model.no_weight_tying and name == TIED
    among = Among.STAGES if is_tied else NOBODY
    if split_dimension(name) is not None:
        return mesh.tensor_rank, among
    return None, among | _among_tensor_ranks(mesh)


def _among_tensor_ranks(mesh: Mesh) -> Among:
    return Among.TENSOR if mesh.tensor_size > 1 else NOBODY


@dataclass(frozen=True)
class Prints:
    """Fingerprints of everything that a rank holds.

    Attributes:
        things: what they are of, without the tensors' values.
        prints: one each, int64 on the device.
        sums: one for each of SUMS, int64 on the device: equal where all that is compared so is equal.
    """

    things: tuple[tuple[str, Among], ...]
    prints: torch.Tensor
    sums: torch.Tensor


def prints_of(engine: Engine) -> Prints:
    """Fingerprint what this rank holds; nothing waits for the device."""
    device = engine.mesh.device
    things, factors, found = [], [], []
    for thing in held(engine):  # one after another: rounded masters are not to be in memory together
        things.append((thing.key, thing.among))
        factors.append(odd_number(f"{thing.name} {thing.kind}"))
        found.append(fingerprint(thing.values, start=thing.start).to(device))
    prints = torch.stack(found)
    members = torch.tensor([[compared in among for compared in SUMS] for _, among in things])
    weighed = prints * torch.tensor(factors).to(device)
    sums = (weighed[:, None] * members.to(device)).sum(dim=0)
    return Prints(tuple(things), prints, sums)


def all_agree(table: Sequence[Sequence[int]], mesh: Mesh, *, masters_are_whole: bool) -> bool:
    """Whether the sums of all ranks show no difference.

    Args:
        table: `Prints.sums` of every rank.
        mesh: for the sizes of the axes.
        masters_are_whole: whether a rank has the masters of all the weights it has, as under ZeRO 3.
    """
    column: dict[Among, list[int]] = {among: [row[i] for row in table] for i, among in enumerate(SUMS)}
    groups = {
        Among.DATA: lambda p, d, t: (p, t),
        Among.TENSOR: lambda p, d, t: (p, d),
        Among.STAGES: lambda p, d, t: (d, t),
    }
    for among, group_of in groups.items():
        found: dict[tuple[int, int], set[int]] = defaultdict(set)
        for rank, value in enumerate(column[among]):
            p, d, t = mesh.coordinates(rank)
            if among is not Among.STAGES or p in (0, mesh.pipe_size - 1):
                found[group_of(p, d, t)].add(value)
        if any(len(values) > 1 for values in found.values()):
            return False
    masters: Counter[object] = Counter()
    whose = [rank if masters_are_whole else _shard(rank, mesh) for rank in range(len(table))]
    for key, value in zip(whose, column[Among.MASTERS], strict=True):
        masters[key] += value
    return all(wrapped(masters[key]) == value for key, value in zip(whose, column[Among.MASTERED], strict=True))


def _shard(rank: int, mesh: Mesh) -> tuple[int, int]:
    stage, _, tensor_rank = mesh.coordinates(rank)
    return stage, tensor_rank


@dataclass(frozen=True)
class Difference:
    """A tensor of which there are different copies.

    Attributes:
        what: name and kind.
        suspects: ranks one of which, or all of which, have it wrong.
        is_certain: whether the others outvote them.
        copies: how many were compared, the masters counting as one.
    """

    what: str
    suspects: tuple[int, ...]
    is_certain: bool
    copies: int


def differences(reports: Sequence[Sequence[tuple[str, Among, int]]], mesh: Mesh) -> list[Difference]:
    """What differs, the clearest cases first.

    Args:
        reports: of every rank: key, with whom it is compared, fingerprint.
        mesh: for the sizes of the axes.
    """
    copies: dict[str, dict[int, int]] = defaultdict(dict)
    masters: dict[str, dict[int, int]] = defaultdict(dict)
    own: dict[str, dict[int, int]] = defaultdict(dict)
    for rank, report in enumerate(reports):
        for key, among, value in report:
            target = masters if among is Among.MASTERS else own if among is Among.OWN else copies
            target[key][rank] = value
    found = [
        difference
        for key, holders in copies.items()
        if (difference := _vote(key, holders, masters.get(key, {}), own.get(key, {}), mesh)) is not None
    ]
    return sorted(found, key=lambda one: (not one.is_certain, len(one.suspects)))


def _vote(
    key: str, holders: dict[int, int], masters: dict[int, int], own: dict[int, int], mesh: Mesh
) -> Difference | None:
    """The ranks that are outvoted; those of all opinions where none has more votes."""
    opinions: dict[int, set[int]] = defaultdict(set)
    for rank, value in holders.items():
        opinions[value].add(rank)
    votes = Counter({value: len(ranks) for value, ranks in opinions.items()})
    # Ranks that hold copies on other tensor ranks or stages have parts of other masters.
    of_whom: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in masters:
        of_whom[_shard(rank, mesh)].append(rank)
    for ranks in of_whom.values():
        value = wrapped(sum(masters[rank] for rank in ranks))
        votes[value] += 1
        if value not in holders.values():
            wrong = {rank for rank in ranks if own.get(rank, masters[rank]) != masters[rank]}
            opinions[value] |= wrong or set(ranks)
    if len(votes) == 1:
        return None
    (best, most), (_, second) = votes.most_common(2)
    is_certain = most > second and most > 1
    suspects = {rank for value, ranks in opinions.items() for rank in ranks if not is_certain or value != best}
    name, kind = key.split(" ")[:2]
    return Difference(f"{name} ({kind})", tuple(sorted(suspects)), is_certain, votes.total())
