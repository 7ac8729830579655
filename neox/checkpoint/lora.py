"""Checkpoints of LoRA runs: read with the factors multiplied out, or compared with the run that goes on from them."""

from pathlib import Path

import torch

from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.runs import RunReader
from neox.checkpoint.weights import WeightReader
from neox.config import LoraConfig
from neox.errors import CheckpointError
from neox.model.lora import FACTORS, is_factor, merge_factors


class MergedWeights:
    """A checkpoint without its factors: adapted matrices are read as W + (alpha / rank) B A, in fp32.

    Args:
        reader: a checkpoint with factors.

    Attributes:
        folder: where its files are.
    """

    def __init__(self, reader: NativeReader) -> None:
        self.folder: Path = reader.folder
        self.reader = reader
        self._scale = saved_lora(reader).scale

    def __contains__(self, name: str) -> bool:
        return not is_factor(name) and name in self.reader

    @property
    def padded_vocab_size(self) -> int:
        """Size of the softmax."""
        return self.reader.padded_vocab_size

    def names(self) -> list[str]:
        """Canonical names of the parameters but the factors."""
        return [name for name in self.reader.names() if not is_factor(name)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each of them, without reading any."""
        return {name: shape for name, shape in self.reader.shapes().items() if not is_factor(name)}

    def tensor(self, name: str) -> torch.Tensor:
        """Read a parameter on the CPU: merged in fp32, or as it is in the file where nothing adapts it.

        Raises:
            CheckpointError: the checkpoint has no such parameter.
        """
        tensor = self.reader.tensor(name)
        module, _, kind = name.rpartition(".")
        factors = [f"{module}.{factor}" for factor in FACTORS]
        if kind != "weight" or factors[0] not in self.reader:
            return tensor
        return merge_factors(tensor, *map(self.reader.tensor, factors), scale=self._scale)


def merged(reader: WeightReader) -> WeightReader:
    """The weights of a checkpoint as one model, its factors multiplied out where it has any."""
    return MergedWeights(reader) if isinstance(reader, NativeReader) and has_factors(reader) else reader


def has_factors(reader: RunReader) -> bool:
    """Whether a LoRA run wrote the checkpoint."""
    return any(map(is_factor, reader.names()))


def saved_lora(reader: RunReader) -> LoraConfig:
    """What the run of a checkpoint adapted."""
    return LoraConfig.model_validate(reader.manifest.config.get("lora") or {})


def check_same_lora(reader: RunReader, lora: LoraConfig) -> None:
    """Compare a run with the checkpoint that it is to go on from.

    Raises:
        CheckpointError: only one of them has factors, or they adapt other matrices or in another way.
    """
    folder = reader.folder
    if not has_factors(reader):
        if lora.is_on:
            raise CheckpointError(
                f"load {folder}: was trained without lora; set finetune: true to start LoRA from its weights"
            )
        return
    saved = saved_lora(reader)
    if not lora.is_on:
        raise CheckpointError(
            f"load {folder}: was trained with lora of rank {saved.rank}; add the same lora section to go on, "
            "or set finetune: true to start from the merged weights"
        )
    for field in ("rank", "alpha", "targets"):
        before, now = getattr(saved, field), getattr(lora, field)
        if before != now:
            raise CheckpointError(
                f"load {folder}: was trained with lora.{field} {_words(before)}, the configuration asks for "
                f"{_words(now)}; set it back, or set finetune: true to start anew from the merged weights"
            )


def _words(value: object) -> str:
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else f"{value:g}"
