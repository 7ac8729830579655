"""A training run of upstream GPT-NeoX, to be gone on with: its weights, its optimizer's state, and how far it had come.

Speaks as a native checkpoint does (`native/store.py`): tensors of the optimizer are `<name>/<state>`, and a
manifest says the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.native.manifest import Layout, Manifest, Progress
from neox.checkpoint.upstream.files import standard_name
from neox.checkpoint.upstream.names import is_buffer, translate
from neox.checkpoint.upstream.parts import Part
from neox.checkpoint.upstream.reader import NO_HINTS, Hints, UpstreamReader
from neox.checkpoint.upstream.zero import (
    MASTER,
    NO_STATE,
    RankStates,
    group_sizes,
    plain_states,
    scaler_fields,
    zero_states,
)
from neox.checkpoint.weight_map import Kind, kind_of
from neox.checkpoint.weights import fields_of, missing_tensor
from neox.errors import CheckpointError

_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bfloat16"}


class UpstreamRun:
    """One `global_step<N>` folder of GPT-NeoX with everything to resume from it.

    Reads the weights, and under `<name>/<state>` the fp32 `master` where the run had one, and the moments `exp_avg` and
    `exp_avg_sq` (or whatever else the optimizer kept for each element). From runs without ZeRO, in fp32 and fp16, and
    from ZeRO 1 to 3 at any number of data-parallel ranks.

    Args:
        folder: the `global_step<N>` folder.
        hints: see `UpstreamReader`.
        with_optimizer: read its state too.

    Attributes:
        folder: as given.
        reader: the weights alone.

    Raises:
        CheckpointError: files are missing or damaged, or the optimizer's state is in a form that cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        hints: Hints = NO_HINTS,
        with_optimizer: bool = True,
    ) -> None:
        self.folder = folder
        self.reader = UpstreamReader(folder, hints)
        self._files = self.reader.files
        self._step = 0
        with fields_of(folder, "GPT-NeoX"):
            self._states = self._read_states() if with_optimizer else {}

    def __contains__(self, key: str) -> bool:
        return key in self._states or key in self.reader

    @property
    def padded_vocab_size(self) -> int:
        """Size of the softmax: it grew with the tensor-parallel size of the run."""
        return self.reader.padded_vocab_size

    def names(self) -> list[str]:
        """Canonical names of all parameters, in the order of the layers."""
        return self.reader.names()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of each parameter, without reading any."""
        return self.reader.shapes()

    def tensor(self, key: str) -> torch.Tensor:
        """Read a parameter, or `<name>/<state>` in fp32, whole, on the CPU.

        Masters are joined as weights are. Of a bias that each tensor rank adds, the moments are those of one rank: all
        had the same gradient.

        Raises:
            CheckpointError: the checkpoint has no such tensor.
        """
        name, _, state = key.partition("/")
        if not state:
            return self.reader.tensor(name)
        if key not in self._states:
            raise missing_tensor(self.folder, key)
        adds = state == MASTER and kind_of(name) is Kind.ROW_BIAS
        return self.reader.join(name, self._states[key], adds=adds).float()

    @cached_property
    def manifest(self) -> Manifest:
        """What a native checkpoint would say of this run."""
        with fields_of(self.folder, "GPT-NeoX"):
            return self._manifest()

    def _manifest(self) -> Manifest:
        state, keys = self._files.state, self.reader.config_keys()
        settings = state.get("ds_config") or {}
        schedule = state.get("lr_scheduler")
        optimizer = keys.get("optimizer") or {}
        shapes, dtype = self.shapes(), str(self._dtype).removeprefix("torch.")
        weights = {name: _entry(shape, dtype) for name, shape in shapes.items()}
        moments = {key: _entry(shapes[key.partition("/")[0]], "float32") for key in self._states}
        return Manifest(
            progress=self._progress(settings),
            layout=Layout(
                pipe_parallel_size=self._stages,
                data_parallel_size=int(state.get("dp_world_size", 1)),
                model_parallel_size=self._files.ranks,
                zero_stage=int((settings.get("zero_optimization") or {}).get("stage", 0)),
            ),
            padded_vocab_size=self.padded_vocab_size,
            precision=_PRECISIONS[self._dtype],
            schedule=dict(schedule) if isinstance(schedule, dict) else {},
            optimizer=str(optimizer.get("type", "adam")).lower() if self._is_resumable else None,
            config=keys,
            files={},
            tensors=weights | moments,
        )

    @property
    def _dtype(self) -> torch.dtype:
        weights = self._files.weights[0]
        return weights[next(iter(weights))].dtype

    @property
    def _is_resumable(self) -> bool:
        """Whether the run's optimizer was saved, be it before its first step."""
        return self._files.has_partitions or bool(_optimizer_of(self._files.state))

    @property
    def _stages(self) -> int:
        """Pipeline stages."""
        return max(1, int(self._files.state.get("mp_world_size", self._files.ranks)) // self._files.ranks)

    def _progress(self, settings: Mapping[str, Any]) -> Progress:
        state, iteration = self._files.state, self.reader.iteration
        # DeepSpeed's count is right also where the batch size has changed on the way, but it does not know of a run
        # that took its weights from another and started to count anew.
        counted = state.get("global_steps") == iteration and "global_samples" in state
        batch = int(settings.get("train_batch_size", 0))
        schedule = state.get("lr_scheduler")
        return Progress(
            iteration=iteration,
            consumed_samples=int(state["global_samples"]) if counted else iteration * batch,
            schedule_step=int(schedule.get("num_iters", iteration)) if isinstance(schedule, dict) else iteration,
            optimizer_step=self._step,
            loss_scaler=self._loss_scaler() if self._dtype is torch.float16 else {},
        )

    def _loss_scaler(self) -> dict[str, float]:
        if self._files.has_partitions:
            return scaler_fields(self._files.partitions(0)[0])
        return scaler_fields(_optimizer_of(self._files.state))

    def _read_states(self) -> dict[str, list[Part]]:
        """Parts by tensor rank of each `<name>/<state>`."""
        if not self._is_resumable:
            return {}
        by_rank = [self._states_of(rank) for rank in range(self._files.ranks)]
        found = {}
        for key in by_rank[0]:
            if not all(key in states for states in by_rank):
                raise CheckpointError(f"{self.folder}: not every tensor rank has {key}; {NO_STATE}")
            found[key] = [states[key] for states in by_rank]
        return found

    def _states_of(self, rank: int) -> dict[str, Part]:
        """`<name>/<state>` of all pipeline stages for one tensor rank."""
        found: dict[str, Part] = {}
        layers = _by_layer(self._files.weights[rank])
        for stage in range(self._stages):
            number = stage * self._files.ranks + rank
            source = self.folder / f"mp_rank_{number:02d}_model_states.pt"
            states = self._stage_states(number, layers, source)
            self._step = max(self._step, states.step)
            for state, tensors in states.states.items():
                # The last stage has a tied embedding a second time, its positions without a gradient.
                named = {str(standard_name(name) or name): part for name, part in tensors.items()}
                found = {f"{name}/{state}": part for name, part in translate(named, source).items()} | found
        if layers and not self._files.has_partitions:
            raise _not_covered(self.folder)
        return found

    def _stage_states(self, number: int, layers: list[dict[str, torch.Size]], source: Path) -> RankStates:
        """The optimizer of one rank of the model-parallel group; takes the layers of its stage from the list."""
        state = self._files.rank_state(number)
        partitions = self._files.partitions(number)
        if partitions:
            return zero_states(state, partitions, source)
        saved = _optimizer_of(state)
        if not saved:
            raise CheckpointError(f"{source}: has no optimizer state, other ranks have; {NO_STATE}")
        shared = {}
        is_last = number // self._files.ranks == self._stages - 1
        if self._stages > 1 and is_last and not any("final_linear" in name for name in self.names()):
            shared = _by_layer(self._files.weights[number % self._files.ranks])[0]
        return plain_states(saved, _groups(saved, shared, layers, source), source)


def _optimizer_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer in the file of a rank; empty where ZeRO keeps it, and in the files of GPT-NeoX's converters."""
    saved = state.get("optimizer")
    return saved if isinstance(saved, dict) else {}


def _by_layer(weights: Mapping[str, Part]) -> list[dict[str, torch.Size]]:
    """Shapes of the parameters of each layer, in the order of the modules."""
    layers: dict[str, dict[str, torch.Size]] = {}
    for name, part in weights.items():
        if not is_buffer(name):
            layers.setdefault(name.split(".")[1], {})[name] = part.shape
    return list(layers.values())


def _groups(
    saved: Mapping[str, Any], shared: Mapping[str, torch.Size], layers: list[dict[str, torch.Size]], source: Path
) -> list[dict[str, torch.Size]]:
    """The parameters of an optimizer's groups, as upstream numbers them.

    Those of a tied embedding come first; then layers follow one another until the groups are full. Matrices decay and
    are the first group, biases and norms the second; without weight decay there is one.

    Args:
        saved: the optimizer's state.
        shared: shapes of parameters that are on another stage too.
        layers: shapes of those that no stage has taken so far; the ones of this stage are taken off.
        source: for errors.
    """
    wanted, by_elements = group_sizes(saved)
    groups: list[dict[str, torch.Size]] = [{} for _ in wanted]
    for layer in _taken(shared, layers):
        if _sizes(groups, by_elements) == wanted:
            layers.insert(0, layer)
            break
        for name, shape in layer.items():
            groups[0 if len(groups) == 1 or _decays(name) else 1][name] = shape
    if _sizes(groups, by_elements) != wanted or len(wanted) > 2:
        raise _not_covered(source)
    return groups


def _not_covered(source: Path) -> CheckpointError:
    return CheckpointError(f"{source}: its optimizer state does not cover its parameters; {NO_STATE}")


def _taken(shared: Mapping[str, torch.Size], layers: list[dict[str, torch.Size]]) -> Iterator[dict[str, torch.Size]]:
    if shared:
        yield dict(shared)
    while layers:
        yield layers.pop(0)


def _sizes(groups: Sequence[Mapping[str, torch.Size]], by_elements: bool) -> list[int]:
    return [sum(shape.numel() if by_elements else 1 for shape in group.values()) for group in groups]


def _decays(name: str) -> bool:
    module, _, kind = name.rpartition(".")
    return kind != "bias" and "norm" not in module.rpartition(".")[2]


def _entry(shape: Sequence[int], dtype: str) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": dtype}
