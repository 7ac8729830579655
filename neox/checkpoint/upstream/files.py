"""The files of one `global_step<N>` folder as upstream GPT-NeoX writes it.

Three layouts hold the weights:

    mp_rank_<rank>_model_states.pt            sequential: one a tensor rank; `module` -> `sequential.<i>.<name>`
    layer_<i>-model_<rank>-model_states.pt    pipeline: one a layer and tensor rank; `<name>`
    zero_pp_rank_<d>_mp_rank_<rank>_*.pt      ZeRO 3: every parameter cut over data-parallel ranks, in fp32

In the first two, `mp_rank_*` holds the rest: arguments, iteration, optimizer, random-number states. There is one for
each pipeline stage and tensor rank, stage * tensor size + rank.
"""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.storage.torch_file import TorchFile
from neox.checkpoint.upstream.parts import Part, as_part, is_tensor
from neox.checkpoint.upstream.zero import zero3_weights
from neox.checkpoint.weights import fields_of
from neox.errors import CheckpointError

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_ZERO3_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_NAME = re.compile(r"(?:module\.)?(?:sequential\.)?(\d+)\.(.+)")
_TIED_NAME = re.compile(r"(?:module\.)?tied_modules\.\w+\.(.+)")


def is_upstream(folder: Path) -> bool:
    """Whether a folder holds upstream's files."""
    return any(folder.glob("*mp_rank_*_model_states.pt")) or bool(_numbered(folder, _LAYER_FILE))


def standard_name(name: str) -> str | None:
    """`layers.<index>.<name>` of a parameter's name in a module of DeepSpeed's; None if it is no such name."""
    if match := _TIED_NAME.fullmatch(name):
        return f"layers.0.{match[1]}"
    match = _NAME.fullmatch(name)
    return f"layers.{match[1]}.{match[2]}" if match else None


class UpstreamFiles:
    """The files of a folder; each is opened once.

    Args:
        folder: the `global_step<N>` folder.

    Attributes:
        folder: as given.
        weights: by tensor rank, the parameters and buffers under their names in the file, `layers.<index>.<name>`.

    Raises:
        CheckpointError: files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        with fields_of(folder, "GPT-NeoX"):
            self.weights = self._read_weights()

    @property
    def ranks(self) -> int:
        """Tensor-parallel size of the run."""
        return len(self.weights)

    @property
    def is_zero3(self) -> bool:
        """Whether ZeRO 3 has cut the weights."""
        return not self._layers and bool(self._zero3)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What the first rank has saved beside the weights; empty where only weights were kept."""
        paths = [*self._states.values(), *self._zero3.values()]
        return self._dictionary(paths[0]) if paths else {}

    @property
    def arguments(self) -> dict[str, Any]:
        """The sizes that upstream saves beside the weights."""
        arguments = self.state.get("args")
        return arguments if isinstance(arguments, dict) else {}

    def rank_state(self, rank: int) -> dict[str, Any]:
        """What a rank of the model-parallel group has saved beside the weights.

        Raises:
            CheckpointError: its file is missing.
        """
        name = f"zero_pp_rank_0_mp_rank_{rank:02d}" if self.is_zero3 else f"mp_rank_{rank:02d}"
        return self._dictionary(self.folder / f"{name}_model_states.pt")

    def partitions(self, rank: int) -> list[dict[str, Any]]:
        """What ZeRO keeps for a rank of the model-parallel group, by data-parallel rank; empty without ZeRO.

        Raises:
            CheckpointError: one of the files is missing.
        """
        paths = {data: path for (data, model), path in self._partitions.items() if model == rank}
        if not paths:
            return []
        given = self._dictionary(next(iter(paths.values())))["optimizer_state_dict"].get("partition_count")
        first = given[0] if isinstance(given, list) and given else given
        count = first if isinstance(first, int) else self.state.get("dp_world_size", max(paths) + 1)
        prefix = "bf16_" if next(iter(paths.values())).name.startswith("bf16_") else ""
        names = [f"{prefix}zero_pp_rank_{data}_mp_rank_{rank:02d}_optim_states.pt" for data in range(count)]
        files = [paths.get(data, self.folder / name) for data, name in enumerate(names)]
        return [self._dictionary(path)["optimizer_state_dict"] for path in files]

    @property
    def has_partitions(self) -> bool:
        """Whether ZeRO keeps the optimizer's state in files of its own."""
        return bool(self._partitions)

    @cached_property
    def _layers(self) -> dict[tuple[int, ...], Path]:
        return _numbered(self.folder, _LAYER_FILE)

    @cached_property
    def _states(self) -> dict[tuple[int, ...], Path]:
        return _numbered(self.folder, _RANK_FILE)

    @cached_property
    def _zero3(self) -> dict[tuple[int, ...], Path]:
        return _numbered(self.folder, _ZERO3_FILE)

    @cached_property
    def _partitions(self) -> dict[tuple[int, ...], Path]:
        return _numbered(self.folder, _OPTIMIZER_FILE)

    def _content(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = TorchFile(path).content
        return self._open[path]

    def _dictionary(self, path: Path) -> dict[str, Any]:
        content = self._content(path)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds no dictionary, as files of GPT-NeoX do; copy it again")
        return content

    def _read_weights(self) -> list[dict[str, Part]]:
        if self._layers:
            return self._read_pipeline()
        return self._read_zero3() if self._zero3 else self._read_sequential()

    def _read_sequential(self) -> list[dict[str, Part]]:
        count = 1 + max((rank for (rank,) in self._states), default=0)
        count = max(count, self.arguments.get("model_parallel_size", count))
        ranks: list[dict[str, Part]] = []
        for rank in range(count):
            path = self.folder / f"mp_rank_{rank:02d}_model_states.pt"
            module = self._dictionary(path).get("module")
            named = {standard_name(name): tensor for name, tensor in (module or {}).items()}
            if not named or None in named:
                raise CheckpointError(
                    f"{path}: holds no weights named sequential.<layer>.<name>, and there are no layer_* files beside "
                    "it; copy the whole folder"
                )
            ranks.append({str(name): as_part(tensor) for name, tensor in named.items() if is_tensor(tensor)})
        return ranks

    def _read_pipeline(self) -> list[dict[str, Part]]:
        count = 1 + max(rank for _, rank in self._layers)
        ranks: list[dict[str, Part]] = [{} for _ in range(count)]
        for index in dict.fromkeys(index for index, _ in self._layers):
            for rank, weights in enumerate(ranks):
                name = f"layer_{index:02d}-model_{rank:02d}-model_states.pt"
                content = self._dictionary(self._layers.get((index, rank), self.folder / name))
                tensors = {name: tensor for name, tensor in content.items() if is_tensor(tensor)}
                weights |= {f"layers.{index}.{name}": as_part(tensor) for name, tensor in tensors.items()}
        return ranks

    def _read_zero3(self) -> list[dict[str, Part]]:
        count = 1 + max(rank for _, rank in self._zero3)
        ranks = []
        for rank in range(count):
            path = self.folder / f"zero_pp_rank_0_mp_rank_{rank:02d}_model_states.pt"
            state = self._dictionary(path)
            parts = zero3_weights(state, self.partitions(rank), _trained_in(state), path)
            named = {standard_name(name): part for name, part in parts.items()}
            if not named or None in named:
                raise CheckpointError(f"{path}: holds no weights named sequential.<layer>.<name>")
            ranks.append({str(name): part for name, part in named.items()})
        return ranks


def _trained_in(state: dict[str, Any]) -> torch.dtype:
    """The dtype of a model whose weights are there in fp32 only."""
    settings = state.get("ds_config") or {}
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
    enabled = [dtype for name, dtype in names.items() if (settings.get(name) or {}).get("enabled")]
    return enabled[0] if enabled else torch.float32


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[tuple[int, ...], Path]:
    """Files by the numbers in their names, in that order."""
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((tuple(map(int, match.groups())), path) for match, path in matches if match))
