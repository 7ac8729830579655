"""Which tokens may be drawn, against numbers of upstream's own filter, and how often they are."""

import json
from pathlib import Path

import pytest
import torch

from neox.inference.sampling import Sampling, draw_tokens, filter_logits

GOLDEN = json.loads((Path(__file__).parents[1] / "data/filter_logits.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_filter_equals_upstreams(case: str) -> None:
    top_k, top_p = (part.partition("=")[2] for part in case.split(","))
    expected = [[float("-inf") if x is None else x for x in row] for row in GOLDEN["cases"][case]]
    filtered = filter_logits(torch.tensor(GOLDEN["logits"]), top_k=int(top_k), top_p=float(top_p))
    assert torch.equal(filtered, torch.tensor(expected))


def test_tiny_nucleus_keeps_the_likeliest_token() -> None:
    filtered = filter_logits(torch.tensor([[0.0, 3.0, 1.0]]), top_p=1e-6)
    assert filtered.isfinite().tolist() == [[False, True, False]]


def test_k_beyond_the_vocabulary_keeps_all() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert torch.equal(filter_logits(logits, top_k=50), logits)


def test_temperature_zero_is_greedy_and_needs_no_generator() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert draw_tokens(logits, Sampling(temperature=0.0, top_k=2), []).tolist() == [1, 0]


def test_frequencies_follow_the_tempered_softmax() -> None:
    logits, count = torch.tensor([[0.0, 1.0, 2.0, 9.0]]), 4000
    generator = torch.Generator().manual_seed(0)
    logits[0, 3] = 1.5
    draws = [int(draw_tokens(logits, Sampling(temperature=2.0), [generator])) for _ in range(count)]
    seen = torch.bincount(torch.tensor(draws), minlength=4) / count
    expected = (logits[0] / 2.0).softmax(0)
    # Five standard deviations of a binomial frequency.
    assert (seen - expected).abs().max() < 5 * (0.25 / count) ** 0.5


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))

    def draw(rows: list[int]) -> list[int]:
        generators = [torch.Generator().manual_seed(10 + row) for row in rows]
        return draw_tokens(logits[rows], Sampling(temperature=1.0), generators).tolist()

    together = draw([0, 1, 2])
    assert [draw([row])[0] for row in range(3)] == together
    assert draw([2, 0]) == [together[2], together[0]]
