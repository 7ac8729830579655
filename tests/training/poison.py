"""Runs in which chosen steps go wrong: their loss and gradient are multiplied by NaN, or by a large number."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from training.layouts import allow_fp16_on_cpu

from neox.checkpoint.native.manifest import Progress
from neox.config import config_from_dict
from neox.data.order import advance
from neox.errors import UserError
from neox.training.batches import BatchMaker, GlobalBatch


@dataclasses.dataclass(frozen=True)
class Poison:
    """Makes batches of which some harm.

    Attributes:
        inner: makes good ones.
        factors: what the loss weights of a batch are multiplied by that holds this place of the order of samples; or
            of this iteration, for keys of text.
    """

    inner: BatchMaker
    factors: Mapping[int | str, float]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def for_step(self, loader: Iterator[Any], progress: Progress) -> GlobalBatch:
        """The batch, poisoned in one micro-batch of one data-parallel rank."""
        batch = self.inner.for_step(loader, progress)
        if self.inner.mesh.data_rank == 0:
            end = advance(progress.consumed_samples, batch.samples, progress.left_out)
            for key, factor in self.factors.items():
                if key == str(progress.iteration + 1) or self._holds(key, progress, end):
                    batch.micro_batches[-1].targets.weights_BS.mul_(factor)
        return batch

    def next(self, loader: Iterator[Any]) -> GlobalBatch:
        """As it is."""
        return self.inner.next(loader)

    def _holds(self, place: int | str, progress: Progress, end: int) -> bool:
        if isinstance(place, str) or any(start <= place < stop for start, stop in progress.left_out):
            return False
        return progress.consumed_samples <= place < end


def train_poisoned(flat: dict[str, Any], world_size: int, factors: Mapping[int | str, float]) -> str:
    """Train on this rank, from the beginning to the last checkpoint; return the error that ended the run, if any."""
    import neox.training.run as module

    torch.set_num_threads(1)
    if flat.get("precision") == "fp16":
        allow_fp16_on_cpu()
    healthy = module.batch_maker
    module.batch_maker = lambda config, mesh: Poison(healthy(config, mesh), factors)  # type: ignore
    try:
        module.train(config_from_dict(flat, world_size=world_size))
    except UserError as error:
        return str(error)
    finally:
        module.batch_maker = healthy
    return ""


def figures(folder: Path, name: str = "train/lm_loss") -> dict[int, float]:
    """A figure by step, the last line of a step counting."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: float(record[name]) for record in records if name in record}


def skips(folder: Path) -> list[dict[str, Any]]:
    """What `skipped.jsonl` tells."""
    path = folder / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, by file and key: weights, masters, moments and dropout streams."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        kind = path.name.split("-")[0]
        found |= {f"{kind}/{key}": value for key, value in load_file(path).items()}
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether every element of every tensor is equal, and none is NaN."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
