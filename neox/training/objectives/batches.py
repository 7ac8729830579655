"""Micro-batches of scored documents: pairs behind each other, rewards and the reference's scores beside them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from neox.training.batches import BatchMaker, GlobalBatch, ModelInputs, global_batch, micro_batch


@dataclass(frozen=True)
class ScoredBatchMaker(BatchMaker):
    """Makes batches of scored documents.

    Attributes:
        mean_over_tokens: whether the loss is a mean over the scored tokens of the step; else over its samples.
    """

    mean_over_tokens: bool = False

    def _take(self, loader: Iterator[Mapping[str, torch.Tensor]], count: int, length: int | None) -> GlobalBatch:
        items = [next(loader) for _ in range(count)]
        rows = [{name: _behind_each_other(value) for name, value in item.items()} for item in items]
        device = self.mesh.device
        made = [micro_batch(row, device=device, mask_after=self.mask_after, length=length) for row in rows]
        batch = global_batch(made, self.mesh)
        inputs = [_with_extras(*both, device) for both in zip(batch.micro_batches, rows, strict=True)]
        samples = sum(len(item["tokens"]) for item in items) * self.mesh.data_size
        weight = batch.token_count if self.mean_over_tokens else torch.full_like(batch.token_count, samples)
        return replace(batch, micro_batches=inputs, samples=samples, token_count=weight)


def _behind_each_other(values: torch.Tensor) -> torch.Tensor:
    """[b, 2, S + 1] -> [2 b, S + 1]: all preferred documents, then all rejected ones; other shapes stay."""
    return values.transpose(0, 1).flatten(0, 1) if values.dim() == 3 else values


def _with_extras(inputs: ModelInputs, row: Mapping[str, torch.Tensor], device: torch.device) -> ModelInputs:
    """Add what is no token or label; what there is of each token of a row belongs to the prediction of the next."""
    extras = {name: value.to(device) for name, value in row.items() if name not in ("tokens", "labels")}
    return inputs._replace(extras={n: v[:, :-1] if v.dim() == 2 else v for n, v in extras.items()})
