"""From token rows to what the model is trained on: inputs, labels, and each token's share of the loss."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from neox.model.loss import Targets
from neox.parallel.mesh import Mesh


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on the device.

    Attributes:
        tokens_BS: int64 inputs.
        labels_BS: int64 next tokens, 0 where masked.
        mask_BS: fp32, 1 where the loss counts; None where every token counts.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    mask_BS: torch.Tensor | None


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's micro-batches of one step, their weights normalised over the whole step.

    Attributes:
        micro_batches: inputs and targets in order.
        token_count: unmasked tokens of the step over all data-parallel ranks, fp32 scalar on the device.
    """

    micro_batches: list[tuple[torch.Tensor, Targets]]
    token_count: torch.Tensor

    def pipeline_items(self) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
        """The micro-batches as DeepSpeed's pipeline engine takes them."""
        for tokens, targets in self.micro_batches:
            yield tokens, (targets.labels_BS, targets.weights_BS)


@dataclass(frozen=True)
class BatchMaker:
    """Takes the micro-batches of one step from a loader.

    Attributes:
        mesh: this rank's place and device.
        accumulation: micro-batches of a step.
        mask_after: see `micro_batch`.
    """

    mesh: Mesh
    accumulation: int
    mask_after: int | None = None

    def next(self, loader: Iterator[Mapping[str, torch.Tensor]]) -> GlobalBatch:
        """The next step's batch."""
        items = [next(loader) for _ in range(self.accumulation)]
        made = [micro_batch(item, device=self.mesh.device, mask_after=self.mask_after) for item in items]
        return global_batch(made, self.mesh)


def micro_batch(item: Mapping[str, torch.Tensor], *, device: torch.device, mask_after: int | None) -> MicroBatch:
    """Shift a row of S+1 tokens into inputs and labels.

    Args:
        item: `tokens`, int64 [B, S+1]; optionally `labels`, int64 [B, S+1] with negative values where masked.
        device: where the model is.
        mask_after: id of an input token whose prediction does not count (`eod_mask_loss`), None for none.
    """
    rows = item["tokens"].to(device, non_blocking=True)
    tokens = rows[:, :-1].contiguous()
    if "labels" not in item and mask_after is None:
        return MicroBatch(tokens, rows[:, 1:].contiguous(), None)
    labels = item.get("labels", item["tokens"]).to(device, non_blocking=True)[:, 1:]
    counted = labels >= 0
    if mask_after is not None:
        counted &= tokens != mask_after
    return MicroBatch(tokens, labels.clamp(min=0).contiguous(), counted.float())


def global_batch(micro_batches: list[MicroBatch], mesh: Mesh) -> GlobalBatch:
    """Give each token its share of the loss.

    The engines average gradients over micro-batches and data-parallel ranks, so each weight is
    (number of micro-batches x data-parallel size) / (unmasked tokens of the whole step): uneven masks then
    give the same gradients at every data-parallel size and accumulation.
    """
    first = micro_batches[0].tokens_BS
    total = torch.zeros((), device=first.device)
    for m in micro_batches:
        total += m.tokens_BS.numel() if m.mask_BS is None else m.mask_BS.sum()
    if mesh.data_size > 1 and any(m.mask_BS is not None for m in micro_batches):
        dist.all_reduce(total, group=mesh.data_group)
    elif mesh.data_size > 1:
        total = total * mesh.data_size
    share = len(micro_batches) * mesh.data_size / total.clamp(min=1.0)
    pairs = []
    for m in micro_batches:
        weights = share.expand(m.tokens_BS.shape) if m.mask_BS is None else m.mask_BS * share
        pairs.append((m.tokens_BS, Targets(m.labels_BS, weights.contiguous())))
    return GlobalBatch(pairs, total)
