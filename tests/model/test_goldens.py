from typing import get_args

import numpy as np
import pytest
import torch
from golden_models import BASE, GOLDENS, canonical, read_golden

from neox.config import config_from_dict
from neox.config.model import Activation
from neox.errors import ConfigError
from neox.model.build import DTYPES, build_decoder
from neox.model.loss import Targets, token_losses

PATHS = sorted((GOLDENS / "logits").glob("*.npz"))
BF16 = [path for path in PATHS if path.stem.endswith("_bf16")]
FP32 = [path for path in PATHS if path not in BF16]


# Tables that are computed here, and the norm that both branches could have read where they share one.
UNUSED = ("inv_freq", "alibi_embed.slopes", "post_attention_layernorm.weight", "post_attention_layernorm.bias")


def rms(tensor):
    return tensor.square().mean().sqrt().item()


def load(path, *, dtype=None):
    config, arrays, weights = read_golden(path)
    named = {canonical(name): tensor for name, tensor in weights.items()}
    model = build_decoder(
        config.model, source=lambda name, shape: named[name].view(shape), dtype=dtype or DTYPES[config.model.precision]
    )
    return config, arrays, named, model


@pytest.mark.parametrize("path", FP32, ids=lambda path: path.stem)
def test_logits_are_upstreams(path):
    # In float64, so that upstream's rounding, which is in the file, is the only one.
    _, arrays, named, model = load(path, dtype=torch.float64)
    unused = set(named) - {name for name, _ in model.named_parameters()}
    assert all(name.endswith(UNUSED) for name in unused)
    logits = model(torch.from_numpy(arrays["tokens"])).detach().numpy()
    assert np.abs(logits - arrays["logits"]).max() <= 2e-6


@pytest.mark.parametrize("path", BF16, ids=lambda path: path.stem)
def test_bf16_logits_are_as_exact_as_upstreams(path):
    # Two right bf16 programs round in different places; each is measured by its distance to fp32.
    config, arrays, named, model = load(path)
    tokens, upstream = torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["logits"])
    exact = build_decoder(config.model, source=lambda name, shape: named[name].view(shape))(tokens)
    ours = model(tokens).float()
    assert (ours - exact).abs().max() <= 2e-2
    assert rms(ours - exact) <= 1.1 * rms(upstream - exact)
    assert rms(ours - upstream) <= 2 * rms(upstream - exact)


@pytest.mark.parametrize("path", BF16, ids=lambda path: path.stem)
def test_bf16_logits_are_near_upstreams(path):
    _, arrays, _, model = load(path)
    ours = model(torch.from_numpy(arrays["tokens"])).float()
    assert (ours - torch.from_numpy(arrays["logits"])).abs().max() <= 2e-2


@pytest.mark.parametrize("path", FP32 + BF16, ids=lambda path: path.stem)
def test_masked_loss_is_upstreams(path):
    config, arrays, _, model = load(path)
    labels, mask = torch.from_numpy(arrays["labels"]), torch.from_numpy(arrays["loss_mask"])
    assert 0 < mask.sum() < mask.numel(), "the golden must mask something for this test to tell"
    tokens = torch.from_numpy(arrays["tokens"])
    loss = model(tokens, Targets(labels, mask / mask.sum())).item()
    if config.model.precision != "fp32":
        assert loss == pytest.approx(float(arrays["loss"]), abs=2e-2)
        losses_BS = token_losses(model(tokens), labels)
        assert (losses_BS * mask).sum().item() / mask.sum().item() == pytest.approx(loss, abs=2e-2)
        return
    losses_BS = token_losses(load(path, dtype=torch.float64)[3](tokens), labels)
    exact = (losses_BS * mask).sum().item() / mask.sum().item()
    assert exact == pytest.approx(float(arrays["loss"]), abs=2e-6)
    # Every addition to the sum of the losses rounds by at most half a unit of the last place.
    assert loss == pytest.approx(exact, rel=labels.numel() * 2**-24)


def test_all_kinds_are_here():
    configs = [read_golden(path)[0].model for path in PATHS]

    def kinds(key):
        return {getattr(config, key) for config in configs}

    assert kinds("pos_emb") == {"learned", "rotary", "sinusoidal", "alibi", "none"}
    assert kinds("norm") == {"layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"}
    assert kinds("activation") == set(get_args(Activation))
    assert kinds("num_kv_heads") == {1, 2, 4, 6}
    assert kinds("sliding_window_width") == {None, 4, 5}
    assert kinds("opt_pos_emb_offset") == {0, 2}
    for key in ("gpt_j_residual", "gpt_j_tied", "bias_gelu_fusion", "no_weight_tying"):
        assert kinds(key) == {True, False}
    for key in ("use_bias_in_attn_linear", "use_bias_in_mlp", "use_qk_layernorm", "is_grouped"):
        assert kinds(key) == {True, False}
    assert {config.rotary_pct for config in configs if config.pos_emb == "rotary"} == {0.25, 0.5, 1.0}


def test_relative_bias_is_refused():
    with pytest.raises(ConfigError, match="pos_emb: 'rpe' is not supported yet"):
        config_from_dict(BASE | {"pos_emb": "rpe"})
