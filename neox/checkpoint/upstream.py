"""Reading checkpoints written by upstream GPT-NeoX, released ones included, as logical tensors."""

import logging
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from neox.checkpoint.unpickle import load_torch_file
from neox.checkpoint.upstream_files import KNOWN, Shards, open_files
from neox.checkpoint.weights import check_shape, missing_tensor
from neox.errors import CheckpointError
from neox.parallel.splits import ONE_GROUP, Row, join_shards, split_dimension, split_of

DRIFT_TOLERANCE = 1e-3
"""Replicated parameters that differ more than this between tensor ranks are reported."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerStates:
    """Adam's state of a run.

    Attributes:
        step: updates made.
        moments: canonical name -> `exp_avg` and `exp_avg_sq`, fp32, of the parameter's shape; empty before step 1.
    """

    step: int
    moments: dict[str, dict[str, torch.Tensor]]


class UpstreamReader:
    """One `global_step<N>` folder, in the sequential or the pipeline layout, at any tensor-parallel size.

    Args:
        folder: the `global_step<N>` folder.
        gpt_j_residual: residual style of the run; None looks it up in the configuration files saved beside the
            weights. It matters only for the biases of row-parallel matrices at tensor-parallel size above 1.

    Attributes:
        folder: as given.
        drift: largest difference between ranks of each replicated parameter read so far, where there is any.

    Raises:
        CheckpointError: files are missing or damaged, or hold another architecture than GPT-NeoX's.
    """

    def __init__(self, folder: Path, *, gpt_j_residual: bool | None = None) -> None:
        self.folder = folder
        self.drift: dict[str, float] = {}
        files = open_files(folder)
        self._ranks = files.ranks
        self._shards = {
            f"layers.{index}.{name}": shards for index, layer in files.layers() for name, shards in layer.items()
        }
        self._gpt_j_residual = gpt_j_residual
        self._check_architecture()

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def names(self) -> list[str]:
        """Canonical names of all parameters, in the order of the layers."""
        return list(self._shards)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of each parameter, without reading any."""
        return {name: self._shape(name) for name in self._shards}

    def tensor(self, name: str) -> torch.Tensor:
        """Read a parameter, whole, on the CPU, in the dtype of the file.

        Split parameters are joined. Copies on several ranks are averaged, as they may have drifted apart by
        rounding. Biases of row-parallel matrices are summed where the run had parallel residuals, because each
        rank then added its own before the reduction, and taken once where it had not.

        Raises:
            CheckpointError: the checkpoint has no such parameter.
        """
        if name not in self._shards:
            raise missing_tensor(self.folder, name)
        shards = self._shards[name]
        if len(shards) == 1 or split_dimension(name) is not None:
            return join_shards(name, shards, shape=torch.Size(self._shape(name)), groups=self._groups(name))
        if _is_row_bias(name) and self._summed_biases:
            return torch.stack(shards).float().sum(0).to(shards[0].dtype)
        return self._agreed(name, shards)

    @property
    def padded_vocab_size(self) -> int:
        """Size of the softmax: it grew with the tensor-parallel size of the run."""
        return self._shape("layers.0.word_embeddings.weight")[0]

    @property
    def iteration(self) -> int:
        """Iterations trained."""
        number = re.search(r"\d+$", self.folder.name)
        return int(self._state.get("iteration", number[0] if number else 0))

    @property
    def arguments(self) -> dict[str, Any]:
        """The sizes that upstream saves beside the weights; empty where only weights were kept."""
        arguments = self._state.get("args")
        return dict(arguments) if isinstance(arguments, dict) else {}

    def optimizer_states(self) -> OptimizerStates:
        """Adam's moments by canonical name, for runs without ZeRO in the sequential layout at one tensor rank.

        Upstream numbers parameters group by group: matrices first, which decay, then biases and norms, each in
        the order of the modules.

        Raises:
            CheckpointError: the state was not saved, or in another layout.
        """
        saved = self._state.get("optimizer")
        if not isinstance(saved, dict) or "state" not in saved or self._state.get("module") is None or self._ranks > 1:
            raise CheckpointError(
                f"{self.folder}: its optimizer state can be read only from fp32 runs with pipe_parallel_size 0, "
                "model_parallel_size 1 and ZeRO 0; start with a fresh one"
            )
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        ordered = list(self._shards)
        if len(saved["param_groups"]) == 2:
            ordered.sort(key=lambda name: len(self._shape(name)) == 1 or "norm" in name.split(".")[-2])
        states = saved["state"]
        if not states:
            return OptimizerStates(step=0, moments={})
        if len(numbers) != len(ordered) or not all(number in states for number in numbers):
            raise CheckpointError(f"{self.folder}: its optimizer state does not cover its {len(ordered)} parameters")
        moments = {}
        for number, name in zip(numbers, ordered, strict=True):
            moments[name] = {key: states[number][key] for key in ("exp_avg", "exp_avg_sq")}
            check_shape(self.folder, f"{name} in the optimizer", moments[name]["exp_avg"].shape, self._shape(name))
        # DeepSpeed's fused Adam counts only on the last parameter of a group.
        return OptimizerStates(step=max(int(states[number]["step"]) for number in numbers), moments=moments)

    @cached_property
    def _state(self) -> dict[str, Any]:
        path = self.folder / "mp_rank_00_model_states.pt"
        state = load_torch_file(path) if path.is_file() else {}
        return state if isinstance(state, dict) else {}

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shards:
            raise missing_tensor(self.folder, name)
        shape = list(self._shards[name][0].shape)
        dimension = split_dimension(name)
        if dimension is not None:
            shape[dimension] = sum(shard.shape[dimension] for shard in self._shards[name])
        return tuple(shape)

    def _agreed(self, name: str, shards: Shards) -> torch.Tensor:
        first = shards[0]
        spread = max(float((first.float() - shard.float()).abs().max()) for shard in shards)
        if spread == 0.0:
            return first
        if spread > DRIFT_TOLERANCE and name not in self.drift:
            logger.warning("%s: %s differs by %.2g between tensor ranks; averaged", self.folder, name, spread)
        self.drift[name] = spread
        return torch.stack(shards).float().mean(0).to(first.dtype)

    @cached_property
    def _summed_biases(self) -> bool:
        """Whether row-parallel biases add up over ranks."""
        if self._gpt_j_residual is not None:
            return self._gpt_j_residual
        found = _saved_setting(self.folder, "gpt_j_residual")
        if found is None:
            raise CheckpointError(
                f"{self.folder}: was trained at model_parallel_size {self._ranks}, and how to join its biases depends "
                "on gpt_j_residual; put the configuration of the run in configs/ beside the weights"
            )
        return bool(found)

    def _groups(self, name: str) -> tuple[int, ...]:
        """The groups of a parameter's rows, told by the shapes (see `neox.parallel.splits`)."""
        module = name.rpartition(".")[0]
        if module.endswith("attention.query_key_value"):
            rows, width = self._shape(f"{module}.weight")
            if rows == 3 * width:
                return ONE_GROUP
            keys = (rows - width) // 2
            unit = math.gcd(width, keys)
            return (width // unit, keys // unit, keys // unit)
        if module.endswith("mlp.linear1"):
            rows, inner = self._shape(f"{module}.weight")[0], self._inner_width(module)
            return (1, 1) if rows == 2 * inner else ONE_GROUP
        return ONE_GROUP

    def _inner_width(self, linear1: str) -> int:
        return self._shape(linear1.replace("linear1", "linear2") + ".weight")[1]

    def _check_architecture(self) -> None:
        """Refuse, by name, what is not a GPT-NeoX decoder."""
        for name in self._shards:
            local = name.split(".", 2)[2]
            if KNOWN.fullmatch(local) is None:
                raise CheckpointError(
                    f"{self.folder}: layer {name.split('.')[1]} holds {local}; only GPT-NeoX layers "
                    "(a norm, fused query_key_value, two-matrix MLP) can be read"
                )
        ranks = self.arguments.get("model_parallel_size", self._ranks)
        if ranks != self._ranks:
            raise CheckpointError(
                f"{self.folder}: has files of {self._ranks} tensor ranks and the run had {ranks}; copy the whole folder"
            )
        for name in self._shards:
            if name.endswith("attention.query_key_value.weight"):
                self._check_heads(name)
            if name.endswith("mlp.linear1.weight"):
                self._check_gate(name)
        if self._ranks > 1 and any(name.endswith("qk_layernorm.weight") for name in self._shards):
            logger.warning(
                "%s: was trained at model_parallel_size %d, where GPT-NeoX normalises queries and keys over the heads "
                "of a rank; here it is over all heads, which gives other logits",
                self.folder,
                self._ranks,
            )

    def _check_heads(self, name: str) -> None:
        rows, width = self._shape(name)
        if not width < rows <= 3 * width or (rows - width) % 2:
            raise CheckpointError(
                f"{self.folder}: {name} has {rows} rows, which are no queries, keys and values of width {width}; "
                "copy the whole folder"
            )

    def _check_gate(self, name: str) -> None:
        rows, inner = self._shape(name)[0], self._inner_width(name.removesuffix(".weight"))
        if rows not in (inner, 2 * inner):
            raise CheckpointError(
                f"{self.folder}: {name} has {rows} rows for the {inner} columns of linear2; "
                "they should be as many, or twice as many where the activation is gated"
            )


def _is_row_bias(name: str) -> bool:
    module, _, kind = name.split(".", 2)[2].rpartition(".")
    return kind == "bias" and isinstance(split_of(module), Row)


def _saved_setting(folder: Path, key: str) -> Any:
    """Look up a key of the configuration saved with a checkpoint; upstream's default False if other keys are there."""
    paths = sorted((folder / "configs").glob("*.yml")) or sorted((folder.parent / "configs").glob("*.yml"))
    merged: dict[str, Any] = {}
    for path in paths:
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError:
            raise CheckpointError(f"{path}: not valid YAML; mend it, {key} is read there") from None
        merged |= {name.replace("-", "_"): value for name, value in (content or {}).items()}
    return merged.get(key, False) if "num_layers" in merged or "hidden_size" in merged else None
