"""Reading checkpoints written by upstream GPT-NeoX, released ones included, as logical tensors."""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from neox.checkpoint.upstream.files import UpstreamFiles
from neox.checkpoint.upstream.names import Dialect, dialect_of, translate
from neox.checkpoint.upstream.old_keys import in_todays_keys
from neox.checkpoint.upstream.parts import Part
from neox.checkpoint.weight_map import Kind, kind_of
from neox.checkpoint.weights import fields_of, missing_tensor
from neox.config import ModelConfig
from neox.config.yaml_files import SUFFIXES, merge
from neox.errors import CheckpointError, ConfigError
from neox.parallel.splits import ONE_GROUP, join_shards, split_dimension

GQALayout = Literal["contiguous", "interleaved"]
"""Rows of query_key_value where heads share keys: [Q; K; V] of a tensor rank, or for each query head its query and its
share of keys and values (GPT-NeoX from February to November 2024)."""

DRIFT_TOLERANCE = 1e-3
"""Replicated parameters that differ more than this between tensor ranks are reported."""

_REWARD_HEAD = ".rm_linear.weight"
"""Upstream divides its inputs; here it is replicated."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hints:
    """What the configuration of a run tells of its files; None where it is not known.

    Attributes:
        gpt_j_residual: residual style. It matters only for the biases of row-parallel matrices at tensor-parallel size
            above 1.
        num_attention_heads: matters only for rows of query_key_value that go from query head to query head.
        gqa_layout: how query_key_value is laid out where heads share keys, which no shape tells.
    """

    gpt_j_residual: bool | None = None
    num_attention_heads: int | None = None
    gqa_layout: GQALayout | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> "Hints":
        """Hints of a resolved model."""
        return cls(model.gpt_j_residual, model.num_attention_heads)


NO_HINTS = Hints()


class UpstreamReader:
    """One `global_step<N>` folder of GPT-NeoX: any layout, tensor-parallel size, ZeRO stage and dialect of names.

    Args:
        folder: the `global_step<N>` folder.
        hints: what they leave open is looked up in the configuration files saved beside the weights. Without a
            `gqa_layout` there either it is `interleaved` with the names of before September 2024, when there was no
            other, and else `contiguous`.

    Attributes:
        folder: as given.
        files: what is in it.
        drift: largest difference between ranks of each replicated parameter read so far, where there is any.

    Raises:
        CheckpointError: files are missing or damaged, or hold another architecture than GPT-NeoX's.
    """

    def __init__(self, folder: Path, hints: Hints = NO_HINTS) -> None:
        self.folder = folder
        self.drift: dict[str, float] = {}
        self.files = UpstreamFiles(folder)
        self._dialect = dialect_of(self.files.weights[0])
        self._shards = self._by_name(self.files.weights)
        self._hints = hints
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
        """Read a parameter, whole, on the CPU, in the dtype of the file; biases that were summed in fp32.

        Split parameters are joined. Copies on several ranks are averaged, as they may have drifted apart by
        rounding. Biases of row-parallel matrices are summed where the run had parallel residuals, because each
        rank then added its own before the reduction, and taken once where it had not.

        Raises:
            CheckpointError: the checkpoint has no such parameter.
        """
        if name not in self._shards:
            raise missing_tensor(self.folder, name)
        return self.join(name, self._shards[name], adds=kind_of(name) is Kind.ROW_BIAS)

    def join(self, name: str, parts: Sequence[Part], *, adds: bool = False) -> torch.Tensor:
        """Put together what the tensor ranks have of a parameter, or of a state that the optimizer keeps of it.

        Args:
            name: of the parameter.
            parts: by tensor rank.
            adds: whether it is a bias to be summed where the run had parallel residuals.
        """
        if name.endswith(_REWARD_HEAD):
            return torch.cat([part.read() for part in parts], dim=1)
        if len(parts) == 1 or split_dimension(name) is not None:
            groups = ONE_GROUP if self._is_interleaved(name) else self._groups(name)
            shape = torch.Size(self._shape(name))
            whole = join_shards(name, [part.read() for part in parts], shape=shape, groups=groups)
            return self._contiguous(name, whole) if self._is_interleaved(name) else whole
        if adds and self._summed_biases:
            total = parts[0].read().float()
            for part in parts[1:]:
                total += part.read()
            return total  # no rank's own bias is rounded; in the dtype of the file their sum would be
        return self._agreed(name, parts)

    @property
    def padded_vocab_size(self) -> int:
        """Size of the softmax: it grew with the tensor-parallel size of the run."""
        return self._shape("layers.0.word_embeddings.weight")[0]

    @property
    def iteration(self) -> int:
        """Iterations trained."""
        number = re.search(r"\d+$", self.folder.name)
        with fields_of(self.folder, "GPT-NeoX"):
            return int(self.files.state.get("iteration", number[0] if number else 0))

    @property
    def arguments(self) -> dict[str, Any]:
        """The sizes that upstream saves beside the weights; empty where only weights were kept."""
        return dict(self.files.arguments)

    def config_keys(self) -> dict[str, Any]:
        """The configuration saved beside the weights, flat; empty where none was."""
        return dict(self._saved_config)

    @cached_property
    def _saved_config(self) -> dict[str, Any]:
        folders = (self.folder / "configs", self.folder.parent / "configs")
        paths = next((found for folder in folders if (found := _configurations(folder))), [])
        try:
            values = merge(paths, ()).values
        except ConfigError as error:
            raise CheckpointError(f"{error}; mend it, the weights cannot be read without") from None
        return in_todays_keys(values, inner_width=self._inner_width("layers.2.mlp.linear1"))

    def _by_name(self, ranks: Sequence[dict[str, Part]]) -> dict[str, list[Part]]:
        """Parts by canonical name, from each tensor rank's under the names of the file."""
        translated = [translate(weights, self.folder) for weights in ranks]
        found: dict[str, list[Part]] = {}
        for name, first in translated[0].items():
            for rank, weights in enumerate(translated):
                shape = weights[name].shape if name in weights else None
                if shape != first.shape:
                    raise CheckpointError(
                        f"{self.folder}: tensor rank {rank} has {name} of shape {list(shape) if shape else None}, "
                        f"rank 0 {list(first.shape)}; copy the whole folder"
                    )
            found[name] = [weights[name] for weights in translated]
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shards:
            raise missing_tensor(self.folder, name)
        shape = list(self._shards[name][0].shape)
        dimension = 1 if name.endswith(_REWARD_HEAD) else split_dimension(name)
        if dimension is not None:
            shape[dimension] = sum(shard.shape[dimension] for shard in self._shards[name])
        return tuple(shape)

    def _agreed(self, name: str, parts: Sequence[Part]) -> torch.Tensor:
        first = parts[0].read()
        total, spread = first.double(), 0.0
        for part in parts[1:]:
            other = part.read()
            spread = max(spread, float((first.float() - other.float()).abs().max()))
            total += other
        if spread == 0.0:
            return first
        if spread > DRIFT_TOLERANCE and name not in self.drift:
            logger.warning("%s: %s differs by %.2g between tensor ranks; averaged", self.folder, name, spread)
        self.drift[name] = spread
        return (total / len(parts)).to(first.dtype)

    @cached_property
    def _summed_biases(self) -> bool:
        """Whether row-parallel biases add up over ranks; TransformerEngine adds one after the reduction."""
        if self._dialect is Dialect.TRANSFORMER_ENGINE:
            return False
        if self._hints.gpt_j_residual is not None:
            return self._hints.gpt_j_residual
        if not {"num_layers", "hidden_size"} & set(self._saved_config):
            raise CheckpointError(
                f"{self.folder}: was trained at model_parallel_size {self.files.ranks}, and how to join its biases "
                "depends on gpt_j_residual; put the configuration of the run in configs/ beside the weights"
            )
        return bool(self._saved_config.get("gpt_j_residual", False))

    def _is_interleaved(self, name: str) -> bool:
        """Whether the rows of a parameter go from query head to query head though heads share keys."""
        if not name.rpartition(".")[0].endswith("attention.query_key_value") or self._groups(name) == ONE_GROUP:
            return False
        told = self._hints.gqa_layout or self._saved_config.get("gqa_layout")
        if told not in (None, *get_args(GQALayout)):
            raise CheckpointError(f"{self.folder}: gqa_layout is {told}; expected {' or '.join(get_args(GQALayout))}")
        return told == "interleaved" if told else self._dialect is Dialect.LEGACY

    def _contiguous(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """[Q; K; V] from rows that go from query head to query head.

        A query head's share of the keys is no head: the shares of all query heads of a group, one after another, are
        the head of keys that they use.
        """
        places = (self.files.arguments, self._saved_config, {"num_attention_heads": self._hints.num_attention_heads})
        heads = next((place["num_attention_heads"] for place in places if place.get("num_attention_heads")), None)
        if not isinstance(heads, int):
            raise CheckpointError(
                f"{self.folder}: the rows of {name} go from head to head, and nothing says how many heads there are; "
                "give the configuration of the run, or put it in configs/ beside the weights"
            )
        query, share, _ = (size * rows.shape[0] // sum(self._groups(name)) // heads for size in self._groups(name))
        by_head = rows.reshape(heads, query + 2 * share, *rows.shape[1:])
        return torch.cat([part.flatten(0, 1) for part in by_head.split((query, share, share), dim=1)])

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
        """Refuse what is not whole, and what is not a GPT-NeoX decoder."""
        ranks = self.arguments.get("model_parallel_size", self.files.ranks)
        if ranks != self.files.ranks:
            raise CheckpointError(
                f"{self.folder}: has files of {self.files.ranks} tensor ranks and the run had {ranks}; "
                "copy the whole folder"
            )
        blocks = {int(name.split(".")[1]) for name in self._shards if ".attention." in name}
        missing = set(range(2, 2 + self.arguments.get("num_layers", max(1, len(blocks))))) - blocks
        if missing or "layers.0.word_embeddings.weight" not in self._shards:
            index = min(missing) if missing and 0 in {int(name.split(".")[1]) for name in self._shards} else 0
            raise CheckpointError(f"{self.folder}: has no layer {index}; copy the whole folder")
        for name in self._shards:
            if name.endswith("attention.query_key_value.weight"):
                self._check_heads(name)
            if name.endswith("mlp.linear1.weight"):
                self._check_gate(name)
        if self.files.ranks > 1 and any(name.endswith(".qk_layernorm.bias") for name in self._shards):
            logger.warning(
                "%s: was trained at model_parallel_size %d, where GPT-NeoX normalises queries and keys over the heads "
                "of a rank; here it is over all heads, which gives other logits",
                self.folder,
                self.files.ranks,
            )

    def _check_heads(self, name: str) -> None:
        rows, width = self._shape(name)
        if not width < rows <= 3 * width or (rows - width) % 2:
            raise CheckpointError(
                f"{self.folder}: {name} has {rows} rows, which are no queries, keys and values of width {width}; "
                "copy the whole folder"
            )
        if rows != 3 * width and self._dialect is Dialect.TRANSFORMER_ENGINE:
            raise CheckpointError(
                f"{self.folder}: {name} is TransformerEngine's, of heads that share keys, which cannot be read"
            )

    def _check_gate(self, name: str) -> None:
        rows, inner = self._shape(name)[0], self._inner_width(name.removesuffix(".weight"))
        if rows not in (inner, 2 * inner):
            raise CheckpointError(
                f"{self.folder}: {name} has {rows} rows for the {inner} columns of linear2; "
                "they should be as many, or twice as many where the activation is gated"
            )
        if rows != inner and self._dialect is Dialect.TRANSFORMER_ENGINE:
            raise CheckpointError(f"{self.folder}: {name} is TransformerEngine's with a gate, which cannot be read")


def _configurations(folder: Path) -> list[Path]:
    """The files of a folder that GPT-NeoX takes as configuration."""
    return sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES)
