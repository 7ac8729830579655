"""Batched generation against the whole model called again for every token."""

from typing import Any

import pytest
import torch
from inference.small_model import naive_greedy, small_model

from neox.inference.cache import KeyValueCache
from neox.inference.generate import GenerationSettings, generate
from neox.inference.sampling import Sampling

PROMPTS = [[65, 66, 67], [104, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100], [7], [300, 301, 302, 303, 304]]
POSITIONS: list[dict[str, Any]] = [
    {},
    {"pos_emb": "learned"},
    {"pos_emb": "none", "gpt_j_residual": False, "no_weight_tying": False},
]


@pytest.mark.parametrize("changes", POSITIONS, ids=["rotary", "learned", "none"])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_row_of_a_batch_equals_its_prompt_alone(changes: dict[str, Any], recompute: bool) -> None:
    model = small_model(**changes).double()
    settings = GenerationSettings(maximum_tokens=20, return_logits=True, recompute=recompute)
    completions = generate(model, PROMPTS, settings=settings)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        tokens, logits = naive_greedy(model, prompt, 20)
        assert completion.tokens == tokens
        # Computed in float64, and rounded once to the float32 that is returned.
        torch.testing.assert_close(completion.logits, logits.float(), rtol=2**-23, atol=1e-9)


def test_sampling_does_not_depend_on_cache_or_batch() -> None:
    model = small_model().double()
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95)

    def tokens(numbers: list[int], *, recompute: bool = False, seed: int = 5) -> list[list[int]]:
        settings = GenerationSettings(maximum_tokens=15, sampling=sampling, recompute=recompute, seed=seed)
        chosen = [PROMPTS[i] for i in numbers]
        return [c.tokens for c in generate(model, chosen, settings=settings, numbers=numbers)]

    together = tokens([0, 1, 2, 3])
    assert tokens([0, 1, 2, 3], recompute=True) == together
    assert tokens([3, 1]) == [together[3], together[1]]
    assert tokens([0, 1, 2, 3], seed=6) != together


def test_rows_end_at_their_own_end_of_document() -> None:
    model = small_model().double()
    naive = [naive_greedy(model, prompt, 20)[0] for prompt in PROMPTS]
    eod = naive[0][4]
    settings = GenerationSettings(maximum_tokens=20, return_logits=True)
    completions = generate(model, PROMPTS, settings=settings, ends=[eod])
    for row, completion in zip(naive, completions, strict=True):
        assert completion.finished == (eod in row)
        assert completion.tokens == (row[: row.index(eod)] if eod in row else row)
        assert completion.logits is not None
        assert len(completion.logits) == len(completion.tokens) + completion.finished
    assert completions[0].finished
    assert not all(completion.finished for completion in completions)


def test_a_stop_rule_ends_a_row_and_keeps_its_last_token() -> None:
    model = small_model().double()
    stop_at = naive_greedy(model, PROMPTS[1], 10)[0][6]
    settings = GenerationSettings(maximum_tokens=10)
    completion = generate(model, [PROMPTS[1]], settings=settings, stop=lambda t: t[-1] == stop_at)[0]
    assert completion.finished
    assert completion.tokens[-1] == stop_at
    assert len(completion.tokens) <= 7


def test_each_of_several_tokens_ends_a_row() -> None:
    model = small_model().double()
    naive = naive_greedy(model, PROMPTS[0], 20)[0]
    settings = GenerationSettings(maximum_tokens=20)
    for end in (naive[4], naive[9]):
        completion = generate(model, [PROMPTS[0]], settings=settings, ends=[-1, end])[0]
        assert completion.finished
        assert completion.tokens == naive[: naive.index(end)]
    first = min(naive.index(naive[4]), naive.index(naive[9]))
    both = generate(model, [PROMPTS[0]], settings=settings, ends=[naive[9], naive[4]])[0]
    assert both.tokens == naive[:first]


@pytest.mark.parametrize("seq_length", [64, 48])
@pytest.mark.parametrize("changes", POSITIONS, ids=["rotary", "learned", "none"])
def test_the_models_positions_end_a_row_with_a_message(changes: dict[str, Any], seq_length: int) -> None:
    """They are what the model was made for, also where a run trains on shorter sequences."""
    model = small_model(**changes, seq_length=seq_length).double()
    prompts = [[9] * 60, [9] * 64, [9], [9] * 90]
    nearly_full, full, short, too_long = generate(model, prompts, settings=GenerationSettings(maximum_tokens=50))
    assert nearly_full.tokens == naive_greedy(model, prompts[0], 4)[0]
    assert nearly_full.message == "stopped at the model's 64 positions"
    assert not nearly_full.finished
    assert short.tokens == naive_greedy(model, [9], 50)[0]
    assert short.message is None
    for completion, length in ((full, 64), (too_long, 90)):
        assert completion.tokens == []
        assert f"the prompt has {length} tokens and the model 64 positions" in str(completion.message)


def test_the_cache_holds_what_was_appended_in_order() -> None:
    k, v = torch.randn(2, 2, 7, 3, 4).unbind(0)
    cache = KeyValueCache(9)
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        keys, values = cache.append(k[:, part], v[:, part])
    assert torch.equal(keys, k)
    assert torch.equal(values, v)
    assert cache.length == 7
    with pytest.raises(AssertionError, match="holds 9 tokens, not 10"):
        cache.append(k[:, :3], v[:, :3])
