"""Log-probabilities of labels, fused with the projection, against torch's log-softmax."""

import pytest
import torch
from ranks import run_ranks

from neox.config import config_from_dict
from neox.model.loss import fused_linear_log_probabilities
from neox.parallel.mesh import build_mesh
from neox.parallel.splits import take_shard
from neox.parallel.vocabulary import ShardedVocabulary, VocabularyRows

VOCABULARY, BATCH, LENGTH, WIDTH = 101, 2, 9, 16


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weights, labels, and what the gradient of each log-probability is multiplied with."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype) * 0.3
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return hidden, weight, labels, torch.randn(BATCH, LENGTH, generator=generator)


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities and both gradients in double precision."""
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    scores = torch.log_softmax(leaves[0] @ leaves[1].T, dim=-1).gather(2, labels[..., None]).squeeze(2)
    return scores.detach(), *torch.autograd.grad((scores * factors).sum(), leaves)


@pytest.mark.parametrize("chunk_bytes", [None, 4 * VOCABULARY * 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(chunk_bytes: int | None, dtype: torch.dtype) -> None:
    hidden, weight, labels, factors = inputs(dtype)
    wanted = plain(hidden, weight, labels, factors)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    scores = fused_linear_log_probabilities(
        *leaves, labels, vocabulary=VocabularyRows(VOCABULARY), chunk_bytes=chunk_bytes
    )
    gradients = torch.autograd.grad((scores * factors).sum(), leaves)
    assert scores.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for found, expected in zip((scores, *gradients), wanted, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_padding_rows_and_frozen_weights() -> None:
    hidden, weight, labels, factors = inputs()
    real = VOCABULARY - 11
    scores = fused_linear_log_probabilities(
        hidden.requires_grad_(), weight, labels % real, vocabulary=VocabularyRows(real)
    )
    wanted, gradient, _ = plain(hidden.detach(), weight[:real], labels % real, factors)
    torch.testing.assert_close(scores.detach().double(), wanted, rtol=1e-5, atol=1e-5)
    (scores * factors).sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), gradient, rtol=1e-5, atol=1e-5)


def test_large_and_tiny_gradients_survive_half_precision() -> None:
    hidden, weight, labels, factors = inputs(torch.float16)
    for scale in (1e6, 1e-9):
        leaf = weight.clone().requires_grad_()
        scores = fused_linear_log_probabilities(hidden, leaf, labels, vocabulary=VocabularyRows(VOCABULARY))
        gradient = torch.autograd.grad((scores * factors * scale).sum(), leaf)[0].double()
        wanted = plain(hidden, weight, labels, factors)[2] * scale
        fits = wanted.abs() < 6e4
        torch.testing.assert_close(gradient[fits], wanted[fits], rtol=2e-2, atol=max(2e-2 * scale, 1e-7))


def sharded(rank_count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, and the gradients of this rank, of a vocabulary divided over the ranks."""
    flat = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8}
    flat |= {"model_parallel_size": rank_count, "train_micro_batch_size_per_gpu": 1}
    mesh = build_mesh(config_from_dict(flat, world_size=rank_count))
    vocabulary = ShardedVocabulary.of(VOCABULARY, mesh, sequence_parallel=False)
    hidden, weight, labels, factors = inputs()
    own = take_shard("final_linear.weight", weight, rank=mesh.tensor_rank, size=rank_count, groups=(1,)).clone()
    leaves = [hidden.requires_grad_(), own.requires_grad_()]
    whole = vocabulary.enter(leaves[0])
    scores = fused_linear_log_probabilities(whole, leaves[1], labels, vocabulary=vocabulary, chunk_bytes=4 * 51 * 4)
    return scores.detach(), *torch.autograd.grad((scores * factors).sum(), leaves)


def test_ranks_that_share_the_vocabulary() -> None:
    wanted = plain(*inputs())
    ranks = run_ranks(sharded, 2, 2)
    rows = torch.cat([gradient for _, _, gradient in ranks])[:VOCABULARY]
    torch.testing.assert_close(rows.double(), wanted[2], rtol=1e-5, atol=1e-5)
    for scores, gradient, _ in ranks:
        torch.testing.assert_close(scores.double(), wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), wanted[1], rtol=1e-5, atol=1e-5)
