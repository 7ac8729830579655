"""Activations and gated MLPs against their formulas in float64, and the widths of upstream."""

import math

import pytest
import torch

from neox.config import config_from_dict
from neox.errors import ConfigError
from neox.model.mlp import MLP

SHAPE = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "seq_length": 8,
    "padded_vocab_size": 32,
    "train_micro_batch_size_per_gpu": 1,
}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


ELEMENTWISE = {
    "gelu": lambda x: x * phi(x),
    "relu": lambda x: max(x, 0.0),
    "softsign": lambda x: x / (1 + abs(x)),
    "swish": lambda x: x * sigmoid(x),
    "silu": lambda x: x * sigmoid(x),
    "mish": lambda x: x * math.tanh(math.log(1 + math.exp(x))),
}
OF_THE_GATE = {
    "geglu": ELEMENTWISE["gelu"],
    "swiglu": ELEMENTWISE["silu"],
    "reglu": ELEMENTWISE["relu"],
    "bilinear": lambda x: x,
    "glu": sigmoid,
}


def model_config(**changes):
    return config_from_dict(SHAPE | changes).model


def tanh_gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


CASES = [(name, False, function) for name, function in (ELEMENTWISE | OF_THE_GATE).items()]
CASES += [("gelu", True, tanh_gelu), ("geglu", True, OF_THE_GATE["geglu"]), ("silu", True, ELEMENTWISE["silu"])]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(("name", "fused", "function"), CASES)
def test_formula(name, fused, function, bias):
    config = model_config(activation=name, bias_gelu_fusion=fused, use_bias_in_mlp=bias, intermediate_size=17)
    torch.manual_seed(1)
    mlp = MLP(config).double()
    assert (mlp.linear1.bias is not None, mlp.linear2.bias is not None) == (bias, bias)
    x = 2 * torch.randn(2, 3, 8, dtype=torch.float64)
    hidden = x @ mlp.linear1.weight.T + (mlp.linear1.bias if bias else 0.0)
    if name in OF_THE_GATE:
        width = mlp.linear1.out_features // 2
        hidden = hidden[..., :width] * hidden[..., width:].detach().clone().apply_(function)
    else:
        hidden = hidden.detach().clone().apply_(function)
    expected = hidden @ mlp.linear2.weight.T + (mlp.linear2.bias if bias else 0.0)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "linear1", "inner"),
    [
        # Upstream's widths, seen in models that it built.
        ({"hidden_size": 32}, 128, 128),
        ({"hidden_size": 32, "expansion_factor": 3.0}, 96, 96),
        ({"hidden_size": 32, "intermediate_size": 96, "activation": "geglu"}, 64, 32),
        ({"hidden_size": 32, "intermediate_size": 192, "activation": "swiglu"}, 128, 64),
        ({"hidden_size": 32, "intermediate_size": 100, "activation": "swiglu", "mlp_multiple_of": 16}, 96, 48),
        ({"intermediate_size": 3 * 11008, "activation": "swiglu"}, 2 * 11008, 11008),
        # Where upstream's two roundings disagree (86 rows and 42 columns) and no model could be built.
        ({"hidden_size": 32, "activation": "geglu"}, 86, 43),
        ({"intermediate_size": 97, "activation": "glu", "mlp_multiple_of": 32}, 64, 32),
        ({"intermediate_size": 98, "activation": "glu", "mlp_multiple_of": 32}, 128, 64),
        ({"intermediate_size": 33, "mlp_multiple_of": 4}, 36, 36),
    ],
)
def test_widths(changes, linear1, inner):
    config = model_config(**changes)
    mlp = MLP(config)
    assert tuple(mlp.linear1.weight.shape) == (linear1, config.hidden_size)
    assert tuple(mlp.linear2.weight.shape) == (config.hidden_size, inner)
    # What is resolved once stays.
    resolved = changes | {"intermediate_size": config.intermediate_size, "expansion_factor": None}
    again = model_config(**resolved)
    assert (again.linear1_width, again.mlp_inner_width) == (linear1, inner)


def upstream_widths(width, multiple):
    """The rows of linear1 and the columns of linear2 of a gated MLP, each by upstream's own rounding."""
    both = int(width * 2 / 3)
    return 2 * multiple * math.ceil(both / (2 * multiple)), multiple * math.ceil(both // 2 / multiple)


def test_widths_are_upstreams_wherever_it_can_build_the_model():
    buildable = 0
    for width in range(3, 400):
        for multiple in (1, 3, 8, 64):
            rows, columns = upstream_widths(width, multiple)
            config = model_config(intermediate_size=width, mlp_multiple_of=multiple, activation="swiglu")
            assert config.linear1_width == 2 * config.mlp_inner_width == rows
            if rows == 2 * columns:
                buildable += 1
                assert config.mlp_inner_width == columns
    assert buildable > 1000


def test_inner_width_must_divide_over_tensor_ranks():
    flat = SHAPE | {"num_attention_heads": 2, "model_parallel_size": 2}
    with pytest.raises(ConfigError, match=r"^intermediate_size: 32 gives an inner width of 11, which is not divisible"):
        config_from_dict(flat | {"activation": "swiglu"}, world_size=2)
    assert config_from_dict(flat | {"activation": "swiglu", "mlp_multiple_of": 2}, world_size=2).model.mlp_inner_width
    with pytest.raises(ConfigError, match=r"^intermediate_size: 33 is not divisible by model_parallel_size 2"):
        config_from_dict(flat | {"intermediate_size": 33}, world_size=2)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"expansion_factor": 0.1}, "expansion_factor: 0.1 leaves the MLP no column with activation gelu; raise it"),
        (
            {"intermediate_size": 1, "activation": "glu"},
            "intermediate_size: 1 leaves the MLP no column with activation glu; raise it",
        ),
        ({"intermediate_size": 7, "expansion_factor": 2}, "expansion_factor: set together with intermediate_size; "),
    ],
)
def test_widths_that_make_no_mlp(changes, line):
    with pytest.raises(ConfigError) as error:
        config_from_dict(SHAPE | changes)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_fusion_without_a_fused_form_is_announced():
    (notice,) = config_from_dict(SHAPE | {"activation": "geglu", "bias_gelu_fusion": True}).notices
    assert notice == "bias_gelu_fusion has no effect: activation is geglu, not gelu"
    assert config_from_dict(SHAPE | {"activation": "gelu", "bias_gelu_fusion": True}).notices == ()
