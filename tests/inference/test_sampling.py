"""Which tokens may be drawn, against numbers of upstream's own filter, and how often they are."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from inference.small_model import small_config

from neox.errors import CheckpointError, ConfigError
from neox.inference.sampling import SMALLEST_TEMPERATURE, Sampling, draw_tokens, filter_logits

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


def test_temperatures_that_cannot_divide_are_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (1e-42, 1e-39, 5e-324):
        assert draw_tokens(logits, Sampling(temperature=temperature), []).tolist() == [1]


@pytest.mark.parametrize("scale", [1.0, 3e38])
def test_the_smallest_temperature_that_divides_draws_the_likeliest(scale: float) -> None:
    """Quotients overflow there unless the largest logit is taken off first."""
    logits = torch.tensor([[0.1, 1.0, -1.0, float("-inf")]]) * scale
    sampling = Sampling(temperature=SMALLEST_TEMPERATURE)
    assert not sampling.greedy
    assert draw_tokens(logits, sampling, [torch.Generator().manual_seed(0)]).tolist() == [1]


def test_a_huge_temperature_draws_evenly_and_never_what_is_ruled_out() -> None:
    logits, generator = torch.tensor([[0.0, 50.0, float("-inf")]]), torch.Generator().manual_seed(0)
    draws = [int(draw_tokens(logits, Sampling(temperature=1e300), [generator])) for _ in range(40)]
    assert set(draws) == {0, 1}


@pytest.mark.parametrize(
    ("given", "key"),
    [
        *(({"temperature": value}, "temperature") for value in (-1.0, -1e-50, math.nan, math.inf)),
        *(({"top_p": value}, "top_p") for value in (-0.1, 1.5, math.nan, math.inf)),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_values_that_mean_nothing_are_refused(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: .* set 0"):
        Sampling(**given)
    with pytest.raises(ConfigError, match=key):
        small_config(**given)


@pytest.mark.parametrize("given", [{"top_p": 0.0}, {"top_p": 1.0}, {"top_k": 0}, {"top_k": 2**70}])
def test_values_at_their_ends_draw_among_all(given: dict[str, Any]) -> None:
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(3))
    drawn = [
        draw_tokens(logits, Sampling(temperature=1.0, **options), [torch.Generator().manual_seed(9)])
        for options in (given, {})
    ]
    assert torch.equal(*drawn)
    assert torch.equal(filter_logits(logits, **given), logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("row", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, -math.inf]])
def test_logits_without_a_likeliest_token_are_an_error(row: list[float], temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], row])
    generators = [torch.Generator(), torch.Generator()]
    with pytest.raises(CheckpointError, match="logits are not finite"):
        draw_tokens(logits, Sampling(temperature=temperature), generators)
