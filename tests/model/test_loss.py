"""The fused loss against the plain one, and what it keeps in memory."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from neox.model.loss import Targets, fused_linear_cross_entropy, token_losses
from neox.parallel.vocabulary import VocabularyRows

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 24, 16, 37


@pytest.fixture
def case() -> tuple[torch.Tensor, torch.Tensor, Targets]:
    torch.manual_seed(0)
    hidden = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH).requires_grad_()
    weights = torch.rand(BATCH, LENGTH) * (torch.rand(BATCH, LENGTH) > 0.3)
    return hidden, weight, Targets(torch.randint(0, VOCABULARY, (BATCH, LENGTH)), weights)


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: Targets, size: int = VOCABULARY) -> torch.Tensor:
    logits = (hidden.double() @ weight.double().T)[..., :size]
    losses = cross_entropy(logits.reshape(-1, size), targets.labels_BS.reshape(-1), reduction="none")
    return (losses * targets.weights_BS.reshape(-1).double()).sum()


@pytest.mark.parametrize("chunk_bytes", [1, 4 * VOCABULARY * 7, 2**30], ids=["token", "uneven", "whole"])
def test_equals_the_plain_loss(case: tuple[torch.Tensor, torch.Tensor, Targets], chunk_bytes: int) -> None:
    hidden, weight, targets = case
    loss = fused_linear_cross_entropy(
        hidden, weight, targets, vocabulary=VocabularyRows(VOCABULARY), chunk_bytes=chunk_bytes
    )
    (loss * 3.0).backward()
    expected = [torch.autograd.grad(plain(hidden, weight, targets) * 3.0, tensor)[0] for tensor in (hidden, weight)]
    assert loss.item() == pytest.approx(plain(hidden, weight, targets).item(), rel=1e-6)
    for found, exact in zip((hidden.grad, weight.grad), expected, strict=True):
        # In fp32: logits are sums of WIDTH products, gradients sums over the vocabulary or the tokens.
        bound = (WIDTH + max(VOCABULARY, BATCH * LENGTH)) * 2**-24 * float(exact.abs().max())
        torch.testing.assert_close(found, exact, rtol=0, atol=bound)


def test_padding_rows_get_no_probability_and_no_gradient(
    case: tuple[torch.Tensor, torch.Tensor, Targets],
) -> None:
    hidden, weight, targets = case
    real = 31
    targets = Targets(targets.labels_BS % real, targets.weights_BS)
    loss = fused_linear_cross_entropy(hidden, weight, targets, vocabulary=VocabularyRows(real))
    loss.backward()
    assert loss.item() == pytest.approx(plain(hidden, weight, targets, real).item(), rel=1e-6)
    assert weight.grad is not None
    assert (weight.grad[real:] == 0).all()


def test_masked_tokens_count_nothing_even_if_their_loss_is_infinite(
    case: tuple[torch.Tensor, torch.Tensor, Targets],
) -> None:
    hidden, weight, targets = case
    weights = torch.zeros_like(targets.weights_BS)
    weights[0, 0] = 1.0
    with torch.no_grad():
        hidden[1] *= 1e30
    loss = fused_linear_cross_entropy(
        hidden, weight, Targets(targets.labels_BS, weights), vocabulary=VocabularyRows(VOCABULARY)
    )
    loss.backward()
    assert torch.isfinite(loss)
    assert hidden.grad is not None
    assert (hidden.grad[0, 1:] == 0).all()


def test_token_losses_are_those_of_torch() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 11), torch.randint(0, 11, (2, 5))
    expected = cross_entropy(logits.view(-1, 11), labels.view(-1), reduction="none").view(2, 5)
    torch.testing.assert_close(token_losses(logits, labels), expected)


class _LargestTensor(TorchDispatchMode):
    """Watches how many numbers the largest tensor made by any operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return output


def test_token_losses_have_no_bias_in_a_large_vocabulary() -> None:
    """A sum of V exponentials that is no worse than fp32 rounding, where one term after another loses 5e-5 nats."""
    size, generator = 49152, torch.Generator().manual_seed(0)
    logits = torch.randn(2, 16, size, generator=generator) * 3
    labels = torch.randint(0, size, (2, 16), generator=generator)
    exact = cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    # Half an ulp of each difference from the largest becomes a relative error of its exponential; a tree of additions
    # has log2(V) roundings, and exp, log and the two subtractions some.
    widest = float((logits.amax() - logits.amin()).double())
    bound = torch.finfo(torch.float32).eps * (widest / 2 + math.log2(size) + 8)
    assert (token_losses(logits, labels).double() - exact).abs().max() < bound
    assert token_losses(logits.double(), labels).dtype == torch.float64


def test_never_makes_all_logits() -> None:
    tokens, width, vocabulary = 512, 8, 1000
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = Targets(torch.zeros(1, tokens, dtype=torch.long), torch.ones(1, tokens))
    with _LargestTensor() as watch:
        loss = fused_linear_cross_entropy(
            hidden, weight, targets, vocabulary=VocabularyRows(vocabulary), chunk_bytes=4 * vocabulary * 32
        )
        loss.backward()
    assert watch.largest <= 32 * vocabulary
