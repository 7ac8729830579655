"""Generation with a cache is generation without, for every kind of attention, padded prompts included."""

from typing import Any

import pytest
import torch
from model.families import FAMILIES, family

from neox.inference.cache import KeyValueCache
from neox.inference.generate import GenerationSettings, generate
from neox.model.attention import Attention, AttentionContext

PROMPTS = [[3, 5, 7], [11, 13, 17, 19, 23, 29, 31, 37, 41], [2], [8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_is_recomputed_is_alone(name: str) -> None:
    model = family(name, dtype=torch.float64)
    asked = GenerationSettings(maximum_tokens=12, return_logits=True)
    cached = generate(model, PROMPTS, settings=asked)
    whole = generate(model, PROMPTS, settings=GenerationSettings(12, recompute=True, return_logits=True))
    for prompt, one, other in zip(PROMPTS, cached, whole, strict=True):
        assert one.tokens == other.tokens
        assert one.logits is not None
        assert other.logits is not None
        # Computed in float64, and rounded once to the float32 that is returned.
        torch.testing.assert_close(one.logits, other.logits, rtol=2**-23, atol=1e-9)
        sequence = torch.tensor([prompt + one.tokens])
        for step in (0, 5, 11):
            with torch.no_grad():
                expected = model(sequence[:, : len(prompt) + step])[0, -1]
            torch.testing.assert_close(one.logits[step], expected.float(), rtol=2**-23, atol=1e-9)


def test_the_cache_holds_the_heads_of_keys_only() -> None:
    model = family("gqa")
    caches = [KeyValueCache(8) for _ in model.blocks]
    positions = torch.arange(3)[None]
    model.hidden(torch.tensor([[1, 2, 3]]), [AttentionContext(positions_BS=positions, cache=cache) for cache in caches])
    assert caches[0]._keys is not None
    assert caches[0]._keys.shape == (1, 8, 2, 8)


def test_a_step_makes_its_mask_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    made, build = [], Attention.mask

    def counted(self: Attention, *args: Any, **options: Any) -> torch.Tensor | None:
        made.append(options["keys"])
        return build(self, *args, **options)

    monkeypatch.setattr(Attention, "mask", counted)
    generate(family("alibi_gqa_window"), PROMPTS, settings=GenerationSettings(maximum_tokens=4))
    assert made == [9, 10, 11, 12]
