"""The three residual forms and the embedding against their formulas, written out in float64."""

import math

import pytest
import torch

from neox.config import config_from_dict
from neox.errors import ConfigError
from neox.model.block import TransformerBlock
from neox.model.embedding import Embedding

SHAPE = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "seq_length": 6,
    "padded_vocab_size": 16,
    "pos_emb": "none",
    "train_micro_batch_size_per_gpu": 1,
}
RESIDUALS = {
    "sequential": {},
    "parallel": {"gpt_j_residual": True},
    "shared_norm": {"gpt_j_residual": True, "gpt_j_tied": True},
}


def model_config(**changes):
    return config_from_dict(SHAPE | changes).model


def randomized(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return module.double()


def norm(x, weights, name):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def attention(x, weights):
    """Causal, two heads of 4, rows of the projection grouped by head."""
    projected = linear(x, weights, "attention.query_key_value").view(*x.shape[:2], 2, 3, 4)
    q, k, v = projected.permute(3, 0, 2, 1, 4)
    scores = q @ k.transpose(-1, -2) / 2.0
    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    mixed = scores.softmax(-1) @ v
    return linear(mixed.transpose(1, 2).reshape(x.shape), weights, "attention.dense")


def mlp(x, weights):
    hidden = linear(x, weights, "mlp.linear1")
    return linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), weights, "mlp.linear2")


def reference(kind, x, weights):
    ln1 = norm(x, weights, "input_layernorm")
    if kind == "sequential":
        y = x + attention(ln1, weights)
        return y + mlp(norm(y, weights, "post_attention_layernorm"), weights)
    ln2 = ln1 if kind == "shared_norm" else norm(x, weights, "post_attention_layernorm")
    return x + attention(ln1, weights) + mlp(ln2, weights)


@pytest.mark.parametrize("attention_bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("mlp_bias", [True, False], ids=["mlp_bias", "no_mlp_bias"])
@pytest.mark.parametrize("kind", RESIDUALS)
def test_block_is_its_formula(kind, mlp_bias, attention_bias):
    config = model_config(**RESIDUALS[kind], use_bias_in_mlp=mlp_bias, use_bias_in_attn_linear=attention_bias)
    block = randomized(TransformerBlock(config))
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    weights = dict(block.named_parameters())
    assert any("post_attention_layernorm" in name for name in weights) == (kind != "shared_norm")
    torch.testing.assert_close(block(x), reference(kind, x, weights), rtol=1e-9, atol=1e-9)


def test_shared_norm_needs_parallel_branches():
    with pytest.raises(ConfigError) as error:
        config_from_dict(SHAPE | {"gpt_j_tied": True})
    assert str(error.value) == (
        "gpt_j_tied: true shares the norm of two parallel branches, and gpt_j_residual is false; "
        "set gpt_j_residual: true or remove gpt_j_tied"
    )


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]])


def embed(positions=None, **changes):
    embedding = randomized(Embedding(model_config(**changes)))
    return embedding(TOKENS, positions), dict(embedding.named_parameters())


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["in_order", "given"])
def test_learned_positions_are_shifted_inside_their_table(positions):
    where = POSITIONS if positions is not None else torch.arange(6).expand(2, 6)
    for offset in (0, 2):
        found, weights = embed(positions, pos_emb="learned", opt_pos_emb_offset=offset)
        table = weights["position_embeddings.weight"]
        assert table.shape == (6 + offset, 8)
        assert torch.equal(found, weights["word_embeddings.weight"][TOKENS] + table[where + offset])


@pytest.mark.parametrize("positions", [None, POSITIONS + 100], ids=["in_order", "beyond_training"])
def test_sinusoids(positions):
    where = torch.arange(6).expand(2, 6) if positions is None else positions
    found, weights = embed(positions, pos_emb="sinusoidal")
    assert list(weights) == ["word_embeddings.weight"]
    angles = where[..., None] / 10000.0 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    expected = weights["word_embeddings.weight"][TOKENS] + torch.cat((angles.sin(), angles.cos()), dim=-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_embedding_norm_comes_after_positions_and_before_dropout():
    found, weights = embed(pos_emb="learned", embedding_norm=True)
    total = weights["word_embeddings.weight"][TOKENS] + weights["position_embeddings.weight"][:6]
    torch.testing.assert_close(found, norm(total, weights, "embedding_norm"), rtol=1e-9, atol=1e-9)
    dropping = randomized(Embedding(model_config(pos_emb="learned", embedding_norm=True, hidden_dropout=0.5)))
    torch.manual_seed(4)
    dropped = dropping(TOKENS)
    kept = dropped != 0
    assert 0.2 < kept.double().mean() < 0.8
    torch.testing.assert_close(dropped[kept], 2 * found[kept], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"pos_emb": "learned", "opt_pos_emb_offset": 2, "max_position_embeddings": 7},
            "seq_length: 6 with opt_pos_emb_offset 2 is longer than max_position_embeddings 7; "
            "set max_position_embeddings: 8",
        ),
        (
            {"pos_emb": "rotary", "opt_pos_emb_offset": 2},
            "opt_pos_emb_offset: 2 shifts learned positions, and pos_emb is 'rotary'; "
            "remove it or set pos_emb: learned",
        ),
        (
            {"pos_emb": "sinusoidal", "hidden_size": 9, "num_attention_heads": 1},
            "hidden_size: 9 is odd, and pos_emb sinusoidal needs pairs; set 10",
        ),
    ],
)
def test_positions_that_do_not_fit(changes, line):
    with pytest.raises(ConfigError) as error:
        config_from_dict(SHAPE | changes)
    assert str(error.value) == line
