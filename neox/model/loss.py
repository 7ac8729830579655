"""Next-token cross-entropy fused with the output projection.

The [tokens, V] logits of a large vocabulary would be the biggest tensor of the whole model, so they are
made a chunk of tokens at a time, turned into the gradients of that chunk at once, and dropped (the idea
of "Cut Your Losses in Large-Vocabulary Language Models", Wijmans et al. 2024, without its filtering, and
of Liger Kernel's fused linear cross-entropy, Hsu et al. 2024). The cost in FLOPs is that of the plain loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from neox.parallel.vocabulary import ShardedVocabulary, VocabularyRows

CHUNK_BYTES = 2**30
"""fp32 logits alive at any time."""

CPU_CHUNK_BYTES = 48 * 2**20
"""The same on a CPU, where a chunk should stay in the caches from one operation to the next."""


@dataclass(frozen=True)
class Targets:
    """What the model should have said.

    Attributes:
        labels_BS: int64 id of the next token; ignored where the weight is 0.
        weights_BS: fp32 share of each token in the loss. They carry the normalisation: 1 over the unmasked
            tokens of the whole global batch (times whatever the engine divides by), so that the sum over
            all micro-batches and ranks is the mean over the tokens that count.
    """

    labels_BS: torch.Tensor
    weights_BS: torch.Tensor


@dataclass(frozen=True)
class Labels:
    """What the model is asked the log-probability of, token by token, instead of a loss.

    Attributes:
        labels_BS: int64 id of the next token.
    """

    labels_BS: torch.Tensor


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Loss and its gradients in one pass over chunks of tokens; backward only scales what forward made.

    The weight of a token scales its row of the narrow matrices, [M, D], rather than of the wide one, [M, V]. It does
    so as its share of the largest weight, which is multiplied in at the very end: shares are 1 or 0 in most runs, and
    gradients of a size that half precision can hold.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes arguments by position
        ctx: Any,
        hidden_MD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_M: torch.Tensor,
        weights_M: torch.Tensor,
        vocabulary: VocabularyRows,
        chunk: int,
        grad_enabled: bool,
    ) -> torch.Tensor:
        # Autograd says what would need a gradient even where none will be asked for.
        need_hidden, need_weight = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden_MD) if need_hidden else None
        grad_weight = torch.empty_like(weight_VD, dtype=torch.float32) if need_weight else None
        ctx.largest_weight = weights_M.max().clamp(min=torch.finfo(torch.float32).tiny)
        shares_M1 = (weights_M / ctx.largest_weight).to(hidden_MD.dtype)[:, None]
        # One buffer for all chunks: on a CPU fresh memory costs more than what is computed in it.
        buffer = torch.empty(min(chunk, len(hidden_MD)), len(weight_VD), dtype=torch.float32, device=hidden_MD.device)
        total = hidden_MD.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_MD), chunk):
            rows = slice(start, start + chunk)
            hidden, labels, weights = hidden_MD[rows], labels_M[rows], weights_M[rows]
            logits = _logits(hidden, weight_VD, vocabulary, buffer[: len(hidden)])
            losses, probabilities = _cross_entropy(logits, labels, vocabulary)
            # not only a product: a masked token may hold an infinite loss, and 0 * inf is not 0
            total += (losses * weights).masked_fill(weights == 0, 0.0).sum()
            if not (need_hidden or need_weight):
                continue
            grad_logits = _minus_one_hot(probabilities, labels, vocabulary).to(weight_VD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[rows]).mul_(shares_M1[rows])
            if grad_weight is not None:
                _accumulate(grad_weight, grad_logits, hidden * shares_M1[rows], is_first=start == 0)
        ctx.grads, ctx.weight_dtype = (grad_hidden, grad_weight), weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        scale = grad_output * ctx.largest_weight
        grad_hidden, grad_weight = (None if g is None else g.mul_(scale) for g in ctx.grads)
        if grad_weight is not None:
            grad_weight = grad_weight.to(ctx.weight_dtype)  # only now: unscaled, fp16 could not hold it
        ctx.grads = None
        return grad_hidden, grad_weight, None, None, None, None, None


def _accumulate(total_VD: torch.Tensor, grad_MV: torch.Tensor, hidden_MD: torch.Tensor, *, is_first: bool) -> None:
    """Add grad^T hidden in fp32, whatever the dtype of the model; the first chunk finds nothing to add to."""
    if grad_MV.dtype == torch.float32:
        torch.addmm(total_VD, grad_MV.T, hidden_MD, beta=0 if is_first else 1, out=total_VD)
        return
    # A GPU can leave the sum of a half-precision product in fp32; a CPU rounds it.
    of_chunk = torch.mm(grad_MV.T, hidden_MD, out_dtype=torch.float32) if grad_MV.is_cuda else grad_MV.T @ hidden_MD
    if is_first:
        total_VD.copy_(of_chunk)
    else:
        total_VD += of_chunk


def _logits(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, vocabulary: VocabularyRows, out_MV: torch.Tensor
) -> torch.Tensor:
    """fp32 logits of the local rows, -inf at padding rows, written to `out_MV`."""
    if weight_VD.dtype == torch.float32:
        torch.mm(hidden_MD, weight_VD.T, out=out_MV)
    else:
        out_MV.copy_(hidden_MD @ weight_VD.T)
    real = vocabulary.real_rows(len(weight_VD))
    if real < len(weight_VD):
        out_MV[:, real:] = float("-inf")
    return out_MV


def _cross_entropy(
    logits_MV: torch.Tensor, labels_M: torch.Tensor, vocabulary: VocabularyRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token loss [M] over the whole vocabulary and, in place of the logits, probabilities of the local rows."""
    largest = logits_MV.amax(dim=-1)
    if isinstance(vocabulary, ShardedVocabulary):
        return _sharded_cross_entropy(logits_MV, largest, labels_M, vocabulary)
    target = logits_MV.gather(1, labels_M[:, None]).squeeze(1)
    probabilities = torch.softmax(logits_MV, dim=-1, out=logits_MV)
    # The largest probability is exp(0) / normaliser.
    return largest - target - probabilities.amax(dim=-1).log(), probabilities


def _sharded_cross_entropy(
    logits_MV: torch.Tensor, largest_M: torch.Tensor, labels_M: torch.Tensor, vocabulary: ShardedVocabulary
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_cross_entropy` where other ranks hold other rows of the vocabulary; all of them take part."""
    vocabulary.maximum(largest_M)
    shifted = logits_MV.sub_(largest_M[:, None])
    local, here = _local_labels(labels_M, shifted.shape[1], vocabulary)
    target = shifted.gather(1, local[:, None]).squeeze(1).masked_fill(~here, 0.0)
    exponentials = shifted.exp_()
    both = torch.stack((exponentials.sum(dim=-1), target))
    vocabulary.sum(both)
    normaliser, target = both
    return normaliser.log() - target, exponentials.div_(normaliser[:, None])


def _local_labels(labels_M: torch.Tensor, rows: int, vocabulary: VocabularyRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Row index of each label clamped into this rank's rows, and whether it truly is here."""
    offset = labels_M - vocabulary.start
    return offset.clamp(0, rows - 1), (offset >= 0) & (offset < rows)


def _minus_one_hot(probabilities_MV: torch.Tensor, labels_M: torch.Tensor, vocabulary: VocabularyRows) -> torch.Tensor:
    """Gradient of the unweighted loss in the logits: probabilities - one_hot(labels), in place."""
    local, here = _local_labels(labels_M, probabilities_MV.shape[1], vocabulary)
    return probabilities_MV.scatter_add_(1, local[:, None], -here[:, None].to(probabilities_MV.dtype))


class _FusedLinearLogProbabilities(torch.autograd.Function):
    """The same chunks where what becomes of a token's loss is not known yet: backward makes the logits again."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes arguments by position
        ctx: Any,
        hidden_MD: torch.Tensor,
        weight_VD: torch.Tensor,
        labels_M: torch.Tensor,
        vocabulary: VocabularyRows,
        chunk: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_MD, weight_VD, labels_M)
        ctx.vocabulary, ctx.chunk = vocabulary, chunk
        scores_M = hidden_MD.new_empty(len(hidden_MD), dtype=torch.float32)
        for rows, losses, _ in _chunks_of_losses(hidden_MD, weight_VD, labels_M, vocabulary, chunk):
            torch.neg(losses, out=scores_M[rows])
        return scores_M

    @staticmethod
    def backward(ctx: Any, grad_M: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden_MD, weight_VD, labels_M = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_MD) if need_hidden else None
        grad_weight = torch.empty_like(weight_VD, dtype=torch.float32) if need_weight else None
        largest = grad_M.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        shares_M1 = (-grad_M / largest).to(hidden_MD.dtype)[:, None]
        for rows, _, probabilities in _chunks_of_losses(hidden_MD, weight_VD, labels_M, ctx.vocabulary, ctx.chunk):
            grad_logits = _minus_one_hot(probabilities, labels_M[rows], ctx.vocabulary).to(weight_VD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[rows]).mul_(shares_M1[rows])
            if grad_weight is not None:
                scaled = hidden_MD[rows] * shares_M1[rows]
                _accumulate(grad_weight, grad_logits, scaled, is_first=rows.start == 0)
        if grad_hidden is not None:
            grad_hidden.mul_(largest)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(largest).to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None


def _chunks_of_losses(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, labels_M: torch.Tensor, vocabulary: VocabularyRows, chunk: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows of each chunk, their losses, and probabilities [m, V] in a buffer that the next chunk overwrites."""
    buffer = torch.empty(min(chunk, len(hidden_MD)), len(weight_VD), dtype=torch.float32, device=hidden_MD.device)
    for start in range(0, len(hidden_MD), chunk):
        rows = slice(start, start + chunk)
        logits = _logits(hidden_MD[rows], weight_VD, vocabulary, buffer[: len(hidden_MD[rows])])
        yield rows, *_cross_entropy(logits, labels_M[rows], vocabulary)


def fused_linear_cross_entropy(
    hidden_BSD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets: Targets,
    *,
    vocabulary: VocabularyRows,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """Weighted sum of the next-token losses of a micro-batch.

    Args:
        hidden_BSD: output of the final norm.
        weight_VD: local rows of the output projection.
        targets: labels and weights of each token.
        vocabulary: which rows `weight_VD` holds.
        chunk_bytes: bound on the fp32 logits that exist at a time; default: by the device.

    Returns:
        fp32 scalar, equal on all ranks of the vocabulary. Under tensor parallelism the gradient of
        `hidden_BSD` is this rank's share: sum it over the group.
    """
    hidden_MD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    chunk = _chunk_of_tokens(weight_VD, chunk_bytes)
    labels_M, weights_M = targets.labels_BS.reshape(-1), targets.weights_BS.reshape(-1)
    return _FusedLinearCrossEntropy.apply(
        hidden_MD, weight_VD, labels_M, weights_M, vocabulary, chunk, torch.is_grad_enabled()
    )


def fused_linear_log_probabilities(
    hidden_BSD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_BS: torch.Tensor,
    *,
    vocabulary: VocabularyRows,
    chunk_bytes: int | None = None,
) -> torch.Tensor:
    """Log-probability of each label, fp32 [B, S]; arguments, ranks and gradients as in `fused_linear_cross_entropy`."""
    hidden_MD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    chunk = _chunk_of_tokens(weight_VD, chunk_bytes)
    scores_M = _FusedLinearLogProbabilities.apply(hidden_MD, weight_VD, labels_BS.reshape(-1), vocabulary, chunk)
    return scores_M.view_as(labels_BS)


def _chunk_of_tokens(weight_VD: torch.Tensor, chunk_bytes: int | None) -> int:
    """How many tokens have their logits made together."""
    if chunk_bytes is None:
        chunk_bytes = CPU_CHUNK_BYTES if weight_VD.device.type == "cpu" else CHUNK_BYTES
    chunk = max(1, chunk_bytes // (4 * weight_VD.shape[0]))
    return chunk - chunk % 256 if chunk > 256 else chunk  # whole tiles of a GPU's matrix units


def token_losses(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Next-token loss of each token in nats, [B, S] fp32 (fp64 of fp64), from whole logits (evaluation and scoring)."""
    logits_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    largest_BS1 = logits_BSV.amax(dim=-1, keepdim=True)
    target_BS = (logits_BSV.gather(-1, labels_BS[..., None]) - largest_BS1).squeeze(-1)
    # On a CPU torch's cross_entropy adds up a vocabulary one term after another: of 128,000 terms in fp32 it loses 1e-4
    # nats where the vocabulary is not the last dimension, 1e-5 where it is. Its sum adds in a tree.
    return (logits_BSV - largest_BS1).exp_().sum(dim=-1).log_() - target_BS
