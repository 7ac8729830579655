"""Each norm against its formula in float64, its gradients against finite differences, and where models have it."""

import pytest
import torch

from neox.config import config_from_dict
from neox.model.layers import Decoder
from neox.model.norms import build_norm
from neox.training.optimizers.build import decays

SHAPE = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 8,
    "padded_vocab_size": 32,
    "train_micro_batch_size_per_gpu": 1,
}
KINDS = ("layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm")
EPSILON = {"layernorm_epsilon": 0.25, "rms_norm_epsilon": 0.5, "scalenorm_epsilon": 0.75}
PARAMETERS = {"layernorm": ["weight", "bias"], "rmsnorm": ["scale"], "scalenorm": ["g"], "non_parametric_layernorm": []}


def model_config(**changes):
    return config_from_dict(SHAPE | changes).model


def norm_of(kind, size=None, **changes):
    """A norm with parameters that are not their initial ones."""
    norm = build_norm(model_config(norm=kind, **changes), size)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(1.0 + 0.5 * torch.randn_like(parameter))
    return norm


def reference(kind, x, parameters, *, eps, dims):
    """The formulas of the module's docstring, in float64."""
    x = x.double()
    given = {name: parameter.double() for name, parameter in parameters.items()}
    if kind in ("layernorm", "non_parametric_layernorm"):
        axes = tuple(range(-dims, 0))
        mean = x.sum(axes, keepdim=True) / x[0].numel()
        variance = ((x - mean) ** 2).sum(axes, keepdim=True) / x[0].numel()
        return (x - mean) / (variance + eps) ** 0.5 * given.get("weight", 1.0) + given.get("bias", 0.0)
    squares = (x * x).sum(-1, keepdim=True)
    if kind == "rmsnorm":
        return x / (squares / x.shape[-1] + eps) ** 0.5 * given["scale"]
    return x / squares.sqrt().clamp(min=eps) * given["g"]


def epsilon_of(kind):
    names = {"rmsnorm": "rms_norm_epsilon", "scalenorm": "scalenorm_epsilon"}
    return names.get(kind, "layernorm_epsilon")


@pytest.mark.parametrize("size", [None, (2, 8)], ids=["hidden", "heads"])
@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind, size):
    norm = norm_of(kind, size, **{epsilon_of(kind): EPSILON[epsilon_of(kind)]})
    shape = size or (16,)
    torch.manual_seed(2)
    # One token is shorter than scalenorm's epsilon.
    x = torch.randn(6, *shape) * torch.logspace(-3, 1, 6).view(6, *(1 for _ in shape))
    exact = reference(kind, x, dict(norm.named_parameters()), eps=EPSILON[epsilon_of(kind)], dims=len(shape))
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-6, atol=1e-6)
    half = x.bfloat16()
    norm.bfloat16()
    exact = reference(kind, half, dict(norm.named_parameters()), eps=EPSILON[epsilon_of(kind)], dims=len(shape))
    assert norm(half).dtype == torch.bfloat16
    # Rounded once: to the nearest bf16 number, but for the rare tie that fp32 decides otherwise.
    torch.testing.assert_close(norm(half).double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    norm = norm_of(kind).double()
    torch.manual_seed(3)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, *norm.parameters()))


def test_other_epsilons_do_not_count():
    x = torch.randn(4, 16) * 1e-2
    for kind in KINDS:
        others = {key: value for key, value in EPSILON.items() if key != epsilon_of(kind)}
        assert torch.equal(norm_of(kind, **others)(x), norm_of(kind)(x))
        notices = config_from_dict(SHAPE | others | {"norm": kind}).notices
        assert sorted(line.split()[0] for line in notices) == sorted(others)


@pytest.mark.parametrize("kind", KINDS)
def test_every_place_has_the_norm_of_the_config(kind):
    model = Decoder(model_config(norm=kind, embedding_norm=True, pos_emb="rotary"))
    places = ["layers.0.embedding_norm", "layers.5.norm"]
    places += [f"layers.{i}.{name}" for i in (2, 3) for name in ("input_layernorm", "post_attention_layernorm")]
    names = {name for name, _ in model.named_parameters()}
    expected = {f"{place}.{parameter}" for place in places for parameter in PARAMETERS[kind]}
    assert {name for name in names if "norm" in name} == expected
    assert not any(decays(name) for name in expected)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in expected}
    assert set(shapes.values()) <= {(1,) if kind == "scalenorm" else (16,)}


def test_vendor_norms_run_as_plain_ones():
    for vendor, plain in (("te_rmsnorm", "rmsnorm"), ("te_layernorm", "layernorm")):
        config = config_from_dict(SHAPE | {"norm": vendor})
        assert config.model.norm == plain
        (notice,) = config.notices
        assert notice == f"norm: {vendor} runs as {plain}, which computes the same without TransformerEngine"
