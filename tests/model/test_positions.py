"""Rotary scalings against transformers, ALiBi's slopes and sinusoids against upstream."""

import math
from typing import Any

import pytest
import torch
from golden_models import BASE
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from neox.config import ModelConfig, config_from_dict
from neox.errors import ConfigError
from neox.model.build import build_decoder, fresh_weights
from neox.model.positions import (
    RotaryEmbedding,
    alibi_slopes,
    longest_input,
    rotary_frequencies,
    sinusoidal_table,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 16}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_betas": YARN | {"beta_fast": 8, "beta_slow": 0.5, "truncate": False},
    "yarn_attention_factor": YARN | {"attention_factor": 1.3},
    "yarn_mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0},
}


def rotary_model(scaling: dict[str, Any] | None, **changes: Any) -> ModelConfig:
    flat = {"hidden_size": 128, "pos_emb": "rotary", "rope_scaling": scaling, "seq_length": 256}
    return config_from_dict(BASE | {"max_position_embeddings": 256} | flat | changes).model


def theirs(scaling: dict[str, Any], *, length: int | None = None, positions: int = 256) -> tuple[torch.Tensor, float]:
    """Frequencies and amplitude that transformers has for heads of 32 dimensions."""
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=positions,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    scaling = SCALINGS[name]
    config = rotary_model(scaling, rotary_emb_base=500000)
    frequencies, amplitude = rotary_frequencies(config, torch.device("cpu"))
    expected, factor = theirs(scaling)
    plain, _ = rotary_frequencies(rotary_model(None, rotary_emb_base=500000), torch.device("cpu"))
    assert ((frequencies - expected) / expected).abs().max() <= 1e-6
    assert amplitude == pytest.approx(factor, rel=1e-9)
    assert ((plain - expected) / expected).abs().max() > 0.1
    rotary = RotaryEmbedding(config)
    angles = torch.outer(torch.arange(256.0), expected)
    assert (rotary.cos_SR - angles.cos() * factor).abs().max() <= 1e-4


@pytest.mark.parametrize("length", [5, 16, 17, 200])
def test_dynamic_angles_follow_the_length_of_sequences(length: int) -> None:
    expected, _ = theirs({"rope_type": "dynamic", "factor": 3.0}, length=length, positions=16)
    config = rotary_model(DYNAMIC, rotary_emb_base=500000, seq_length=length)
    found, _ = rotary_frequencies(config, torch.device("cpu"))
    plain, _ = rotary_frequencies(rotary_model(None, rotary_emb_base=500000), torch.device("cpu"))
    assert ((found - expected) / expected).abs().max() <= 1e-6
    assert torch.equal(found, plain) == (length <= 16)
    unset = rotary_model({"rope_type": "dynamic", "factor": 3.0}, rotary_emb_base=500000, seq_length=length)
    assert torch.equal(rotary_frequencies(unset, torch.device("cpu"))[0], plain)


def test_rotation_with_positions_is_that_of_the_place() -> None:
    rotary = RotaryEmbedding(rotary_model(YARN))
    heads = torch.randn(1, 9, 4, 32)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    turned = rotary(heads, positions)
    parts = [rotary(part) for part in heads.split((4, 2, 3), dim=1)]
    assert torch.equal(turned, torch.cat(parts, dim=1))


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20, 40])
def test_slopes(heads: int) -> None:
    # Press et al.: for a power of two a geometric sequence from 2^(-8/n); between them, n/2's and every other of 2n's.
    power = 2 ** int(math.log2(heads))
    expected = [2 ** (-8 / power * (i + 1)) for i in range(power)]
    expected += [2 ** (-8 / (2 * power) * (i + 1)) for i in range(2 * power)][::2][: heads - power]
    assert alibi_slopes(heads) == pytest.approx(expected, rel=1e-12)


def test_slopes_are_upstreams() -> None:
    assert alibi_slopes(3) == (0.0625, 0.00390625, 0.25)
    assert alibi_slopes(6) == (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)
    assert alibi_slopes(20)[16:] == pytest.approx(
        (0.8408964152537145, 0.5946035575013604, 0.42044820762685714, 0.2973017787506802)
    )


def test_sinusoids() -> None:
    table = sinusoidal_table(torch.tensor([[0, 7]]), 6)
    expected = [f(7 / 10000 ** (i / 3)) for f in (math.sin, math.cos) for i in range(3)]
    assert table.dtype == torch.float32
    assert table[0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert table[0, 1].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear", "factor": 2.0}, r"rope_scaling.type: unknown key; did you mean rope_type: linear\?"),
        ({"factor": 2.0}, "rope_scaling: rope_type is missing; add one of linear, dynamic, yarn, llama3"),
        ({"rope_type": "yarm", "factor": 2.0}, "rope_scaling.rope_type: 'yarm' is unknown; .*; did you mean 'yarn'"),
        ({"rope_type": "longrope"}, "'longrope' is unknown; supported: linear, dynamic, yarn, llama3"),
        ({"rope_type": "linear"}, "rope_scaling: factor is missing, which rope_type linear needs; add it"),
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor: expected a number of 1 or more, got '2'"),
        ({"rope_type": "linear", "factor": True}, "rope_scaling.factor: expected a number of 1 or more, got True"),
        (
            {"rope_type": "linear", "factor": float("nan")},
            "rope_scaling.factor: expected a number of 1 or more, got nan",
        ),
        ({"rope_type": "linear", "factor": 0.5}, "rope_scaling.factor: expected a number of 1 or more, got 0.5"),
        ({"rope_type": "linear", "facto": 2, "factor": 2}, "unknown key for rope_type linear; did you mean 'factor'"),
        (LLAMA3 | {"rope_theta": 1e4}, "rope_scaling.rope_theta: unknown key; set rotary_emb_base beside"),
        (LLAMA3 | {"low_freq_factor": 4}, "high_freq_factor: 4 must be above low_freq_factor 4; change one"),
        (LLAMA3 | {"original_max_position_embeddings": 8.5}, "expected a length in tokens, got 8.5"),
        (YARN | {"beta_slow": 40}, "beta_fast: 32 must be above beta_slow 40"),
        (YARN | {"truncate": 1}, "rope_scaling.truncate: expected true or false, got 1"),
        (YARN | {"mscale": -1}, "rope_scaling.mscale: expected a number above 0, got -1"),
    ],
)
def test_mistakes_are_one_line(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        rotary_model(scaling)
    assert "\n" not in str(caught.value)


def test_scaling_needs_rotary_positions() -> None:
    with pytest.raises(ConfigError, match="rope_scaling: scales rotary positions, and pos_emb is 'alibi'; set pos_emb"):
        rotary_model(YARN, pos_emb="alibi")
    with pytest.raises(ConfigError, match="'dynamic' needs 4 rotated dimensions or more"):
        rotary_model(DYNAMIC, rotary_pct=2 / 32)


def test_layers_share_one_copy_of_the_tables() -> None:
    config = config_from_dict(BASE | {"pos_emb": "rotary", "num_layers": 3, "train_micro_batch_size_per_gpu": 1})
    model = build_decoder(config.model, source=fresh_weights(config), dtype=torch.bfloat16)
    assert len({buffer.data_ptr() for buffer in model.buffers()}) == 2


@pytest.mark.parametrize(
    ("scaling", "changes", "longest"),
    [
        (None, {"seq_length": 64}, 256),
        (None, {"seq_length": 64, "pos_emb": "alibi"}, 256),
        (None, {"seq_length": 64, "pos_emb": "learned"}, 256),
        (None, {"seq_length": 64, "pos_emb": "learned", "opt_pos_emb_offset": 2}, 254),
        (YARN, {"seq_length": 64}, 256),
        # Angles of dynamic NTK are those of seq_length, and plain ones up to the length trained on.
        (DYNAMIC, {"seq_length": 64}, 64),
        (DYNAMIC, {"seq_length": 8}, 16),
        (DYNAMIC | {"original_max_position_embeddings": 999}, {"seq_length": 8}, 256),
    ],
)
def test_the_longest_input_is_that_of_the_model(
    scaling: dict[str, Any] | None, changes: dict[str, Any], longest: int
) -> None:
    assert longest_input(rotary_model(scaling, **changes)) == longest
