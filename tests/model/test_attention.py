"""Attention of every kind against its definition in fp64, and documents that do not see each other."""

import math

import pytest
import torch
from model.families import FAMILIES, family, family_config
from transformers.masking_utils import sliding_window_overlay

from neox.model.attention import PLAIN, Attention, AttentionContext, CoreAttention, with_shared_mask
from neox.model.layers import Decoder
from neox.model.masks import attention_mask
from neox.model.positions import alibi_slopes

LENGTHS = [7, 1, 12, 20]


def packed(lengths: list[int] = LENGTHS) -> tuple[torch.Tensor, AttentionContext]:
    """A row of documents: tokens, and the context with positions that start anew in each."""
    count = sum(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    tokens = (torch.arange(count)[None] * 17 + 5) % 61
    return tokens, AttentionContext(positions_BS=positions, documents_BS=numbers)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("kind", ["causal", "window", "alibi", "alibi_window", "documents", "padded"])
def test_scores_are_those_of_the_definition(kind: str, queries: int, kv_heads: int) -> None:
    keys, heads, size = 9, 6, 8
    if kind == "documents":
        queries = keys  # they are known of whole rows only
    q = torch.randn(2, queries, heads, size, dtype=torch.float64)
    k, v = torch.randn(2, 2, keys, kv_heads, size, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    padding = torch.tensor([3, 0])
    window, slopes = (3 if "window" in kind else None), (alibi_slopes(heads) if "alibi" in kind else ())
    seen = torch.zeros(2, queries, keys, dtype=torch.bool)
    cost = torch.zeros(heads, queries, keys, dtype=torch.float64)
    for i in range(queries):
        column = keys - queries + i
        for j in range(column + 1):
            near = window is None or column - j <= window
            own = documents[:, column] == documents[:, j] if kind == "documents" else torch.tensor([True, True])
            real = (j >= padding) | (j == column) if kind == "padded" else torch.tensor([True, True])
            seen[:, i, j] = near & own & real
            cost[:, i, j] = -(column - j) * torch.tensor(slopes or [0.0] * heads, dtype=torch.float64)
    mask = attention_mask(
        queries=queries,
        keys=keys,
        window=window,
        slopes=slopes,
        mask_BSK=seen if kind == "padded" else None,
        documents_BS=documents if kind == "documents" else None,
        dtype=q.dtype,
        device=q.device,
    )
    assert (mask is None) == (kind == "causal" and queries == keys)
    out = CoreAttention(0.0)(q, k, v, mask)
    # Head j of the queries uses head j // (6 / kv_heads) of the keys.
    wide = [x[:, :, torch.arange(heads) // (heads // kv_heads)] for x in (k, v)]
    scores = torch.einsum("bsnh,bknh->bnsk", q, wide[0]) / math.sqrt(size) + cost
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bnsk,bknh->bsnh", weights, wide[1])
    assert (out - expected).abs().max() <= (1e-12 if not slopes else 2e-6)  # the slopes are fp32


def test_the_window_is_one_less_than_that_of_transformers() -> None:
    mask = attention_mask(
        queries=12,
        keys=12,
        window=4,
        slopes=(),
        mask_BSK=None,
        documents_BS=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert mask is not None
    seen = sliding_window_overlay(5)
    expected = [[j <= i and bool(seen(0, 0, i, j)) for j in range(12)] for i in range(12)]
    assert (mask[0, 0] == 0).tolist() == expected
    assert [sum(row) for row in expected] == [1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5, 5]


def test_layers_share_a_mask() -> None:
    model, like = family("alibi"), torch.zeros(1)
    first, second = (block.attention for block in model.blocks)
    assert first.mask(PLAIN, queries=8, keys=8, like=like) is second.mask(PLAIN, queries=8, keys=8, like=like)
    plain = family("window").blocks[0].attention
    assert plain.mask(PLAIN, queries=5, keys=5, like=like) is None
    assert plain.mask(PLAIN, queries=6, keys=6, like=like) is not None
    _, context = packed()
    shared = with_shared_mask(context, first, like)
    assert with_shared_mask(shared, second, like).scores_mask is shared.scores_mask
    assert with_shared_mask(PLAIN, first, like) is PLAIN
    # A mask that was made for generation must not be given to training.
    with torch.inference_mode():
        first.mask(PLAIN, queries=8, keys=8, like=like)
    assert not first.mask(PLAIN, queries=8, keys=8, like=like).is_inference()


def alone(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of each document of a packed row, computed on its own."""
    return torch.cat([model(part) for part in tokens.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_documents_of_a_row_are_computed_as_if_alone(name: str) -> None:
    model = family(name, dtype=torch.float64)
    tokens, context = packed()
    logits = model(tokens, contexts=context)
    assert (logits - alone(model, tokens)).abs().max() <= 1e-12 * logits.abs().max()
    if name not in ("window", "gqa_window_half", "none"):
        assert (logits - model(tokens)).abs().max() > 1e-2
    changed = tokens.clone()
    changed[:, 8:20] = (changed[:, 8:20] + 1) % 61
    difference = (model(changed, contexts=context) - logits).abs()
    assert difference[:, :8].max() == 0
    assert difference[:, 20:].max() == 0
    assert difference[:, 8:20].max() > 0.1


@pytest.mark.parametrize("name", ["gqa_window_half", "alibi_gqa_window", "dynamic_gqa"])
def test_gradients_of_documents_are_those_alone(name: str) -> None:
    tokens, context = packed()
    gradients = []
    for recompute, together in ((0, True), (1, True), (0, False)):
        model = family(name, dtype=torch.float64).train()
        model.recompute_every = recompute
        logits = model(tokens, contexts=context) if together else alone(model, tokens)
        logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for packed_row, recomputed, expected in zip(*gradients, strict=True):
        assert torch.equal(packed_row, recomputed)
        assert (packed_row - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_half_precision_masks() -> None:
    tokens, context = packed()
    for name in ("mha", "alibi_gqa_window"):
        exact, half = family(name), family(name, dtype=torch.bfloat16)
        # Weights are rounded too, so that only the arithmetic differs.
        rounded = {name: p.data.float() for name, p in half.named_parameters()}
        exact.load_state_dict(rounded, strict=False)
        found, expected = half(tokens, contexts=context).float(), exact(tokens, contexts=context)
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def test_heads_are_read_off_the_weights() -> None:
    config = family_config("gqa").model
    attention = Attention(config)
    assert attention.query_key_value.weight.shape == ((6 + 2 * 2) * 8, 48)
    q, k, v = attention._project(torch.zeros(1, 3, 48))
    assert (q.shape[2], k.shape[2], v.shape[2]) == (6, 2, 2)
    bias = family_config("gqa", use_bias_in_attn_linear=False).model
    assert not [name for name, _ in Attention(bias).named_parameters() if name.endswith("bias")]
