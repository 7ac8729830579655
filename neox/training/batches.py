"""From token rows to what the model is trained on: inputs, labels, and each token's share of the loss."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.distributed as dist

from neox.checkpoint.native.manifest import Progress
from neox.config.ramp import BatchRamp
from neox.model.attention import AttentionContext
from neox.model.loss import Targets
from neox.parallel.mesh import Mesh
from neox.pulse import pulse
from neox.training.curriculum import Curriculum


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on the device.

    Attributes:
        tokens_BS: int64 inputs.
        labels_BS: int64 next tokens, 0 where masked.
        mask_BS: fp32, 1 where the loss counts; None where every token counts.
        context: the documents of the rows and the positions in them; None where a row is one document.
    """

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    mask_BS: torch.Tensor | None
    context: AttentionContext | None = None


class ModelInputs(NamedTuple):
    """What a model is called with in training: its three arguments, in order; and what only an objective reads."""

    tokens_BS: torch.Tensor
    targets: Targets
    context: AttentionContext | None
    extras: Mapping[str, torch.Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's micro-batches of one step, their weights normalised over the whole step.

    Attributes:
        micro_batches: inputs and targets in order.
        token_count: unmasked tokens of the step over all data-parallel ranks, fp32 scalar on the device. Where the
            loss is a mean over samples: their number.
        samples: sequences of the step over all data-parallel ranks.
    """

    micro_batches: list[ModelInputs]
    token_count: torch.Tensor
    samples: int

    @property
    def length(self) -> int:
        """Tokens of a sequence, S."""
        return self.micro_batches[0].tokens_BS.shape[1]

    def pipeline_items(self) -> Iterator[tuple[torch.Tensor | tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]:
        """The micro-batches as DeepSpeed's pipeline engine takes them: tensors, or tuples of tensors."""
        for tokens, targets, context, _ in self.micro_batches:
            inputs = tokens if context is None else (tokens, *documents_of(context))
            yield inputs, (targets.labels_BS, targets.weights_BS)


@dataclass(frozen=True)
class BatchMaker:
    """Takes the micro-batches of one step from a loader.

    Attributes:
        mesh: this rank's place and device.
        accumulation: micro-batches of a step.
        mask_after: see `micro_batch`.
        curriculum: shorter sequences at the beginning of training; None for none.
        ramp: fewer micro-batches a step at the beginning of training; None for none.
    """

    mesh: Mesh
    accumulation: int
    mask_after: int | None = None
    curriculum: Curriculum | None = None
    ramp: BatchRamp | None = None

    def for_step(self, loader: Iterator[Mapping[str, torch.Tensor]], progress: Progress) -> GlobalBatch:
        """The batch of the training step that follows `progress`."""
        count, length = self.accumulation, None
        if self.ramp is not None:
            count = self.accumulation * self.ramp.size_at(progress.consumed_samples) // self.ramp.full
        if self.curriculum is not None:
            length = self.curriculum.length_at(progress.iteration + 1)
        return self._take(loader, count, length)

    def next(self, loader: Iterator[Mapping[str, torch.Tensor]]) -> GlobalBatch:
        """A full batch of whole sequences, as evaluation takes them."""
        return self._take(loader, self.accumulation, None)

    def _take(self, loader: Iterator[Mapping[str, torch.Tensor]], count: int, length: int | None) -> GlobalBatch:
        made = []
        for _ in range(count):
            item = next(loader)
            pulse()  # a slow loader gets on as well
            made.append(micro_batch(item, device=self.mesh.device, mask_after=self.mask_after, length=length))
        return global_batch(made, self.mesh)


def micro_batch(
    item: Mapping[str, torch.Tensor],
    *,
    device: torch.device,
    mask_after: int | None,
    length: int | None = None,
) -> MicroBatch:
    """Shift a row of S+1 tokens into inputs and labels.

    Args:
        item: `tokens`, int64 [B, S+1]; optionally `labels`, int64 [B, S+1] with negative values where masked, and
            `documents`, int64 [B, S+1], the numbers of the documents that do not see each other (`document_masking`).
        device: where the model is.
        mask_after: id of an input token whose prediction does not count (`eod_mask_loss`), None for none.
        length: inputs to keep of each row, S where None.
    """
    kept = slice(None if length is None else length + 1)
    rows = item["tokens"][:, kept].to(device, non_blocking=True)
    tokens = rows[:, :-1].contiguous()
    context = None
    if "documents" in item:
        context = document_context(item["documents"][:, kept][:, :-1].to(device, non_blocking=True))
    if "labels" not in item and mask_after is None:
        return MicroBatch(tokens, rows[:, 1:].contiguous(), None, context)
    labels = item.get("labels", item["tokens"])[:, kept].to(device, non_blocking=True)[:, 1:]
    counted = labels >= 0
    if mask_after is not None:
        counted &= tokens != mask_after
    return MicroBatch(tokens, labels.clamp(min=0).contiguous(), counted.float(), context)


def document_context(documents_BS: torch.Tensor) -> AttentionContext:
    """Number the tokens of each document from 0.

    A row that begins or ends within a document holds a piece of it, and the piece is treated as a document.

    Args:
        documents_BS: int64, the number of each token's document within its row; those of a document lie side by side.

    Returns:
        `documents_BS` and `positions_BS`, int64, on the device of the numbers; nothing waits for it.
    """
    places_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    is_first_BS = documents_BS != documents_BS.roll(1, dims=1)  # of place 0 it does not matter: its position is 0
    starts_BS = torch.where(is_first_BS, places_S, 0)
    return AttentionContext(positions_BS=places_S - starts_BS.cummax(1).values, documents_BS=documents_BS.contiguous())


def documents_of(context: AttentionContext) -> tuple[torch.Tensor, torch.Tensor]:
    """`documents_BS` and `positions_BS` of a context that has them."""
    assert context.documents_BS is not None, "a batch's context numbers the documents"
    assert context.positions_BS is not None, "a batch's context has positions"
    return context.documents_BS, context.positions_BS


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
    inputs = []
    for m in micro_batches:
        weights = share.expand(m.tokens_BS.shape) if m.mask_BS is None else m.mask_BS * share
        inputs.append(ModelInputs(m.tokens_BS, Targets(m.labels_BS, weights.contiguous()), m.context))
    return GlobalBatch(inputs, total, samples=sum(len(m.tokens_BS) for m in micro_batches) * mesh.data_size)
