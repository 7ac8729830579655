from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy
from weight_sources import RandomWeights

from neox.checkpoint.huggingface import export_huggingface
from neox.checkpoint.huggingface_config import huggingface_name
from neox.config import config_from_dict
from neox.model.build import build_decoder
from neox.model.loss import Targets

SHAPE = {
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "seq_length": 40,
    "padded_vocab_size": 96,
    "pos_emb": "rotary",
    "train_micro_batch_size_per_gpu": 1,
}


def build_both(tmp_path, **keys):
    """Our model and transformers' with the same random weights."""
    from transformers import GPTNeoXForCausalLM

    config = config_from_dict(SHAPE | keys).model
    weights = RandomWeights(config, seed=3)
    ours = build_decoder(config, source=weights.weight)
    export_huggingface(weights, config, tmp_path / "hf", dtype=torch.float32)
    return config, ours, GPTNeoXForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize(
    ("parallel", "rotary_pct", "tanh", "untied"),
    product((True, False), (0.25, 1.0), (True, False), (True, False)),
    ids=str,
)
def test_logits_and_gradients_equal_transformers(tmp_path, parallel, rotary_pct, tanh, untied):
    config, ours, theirs = build_both(
        tmp_path, gpt_j_residual=parallel, rotary_pct=rotary_pct, bias_gelu_fusion=tanh, no_weight_tying=untied
    )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    tokens, labels = torch.randint(96, (2, 2, 40), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    assert (ours(tokens) - expected).abs().max() <= 1e-5

    loss = ours(tokens, Targets(labels, torch.full(labels.shape, 1 / labels.numel())))
    their_loss = cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    loss.backward()
    their_loss.backward()
    their_gradients = {name.replace("lm_head", "embed_out"): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        their_gradient = their_gradients.pop(huggingface_name(name, num_layers=config.num_layers))
        assert parameter.grad.abs().max() > 0, name
        assert (parameter.grad - their_gradient).abs().max() <= 1e-5, name
    assert not their_gradients


def test_another_rotary_base_epsilon_and_attention_without_biases(tmp_path):
    _, ours, theirs = build_both(
        tmp_path, rotary_emb_base=500, layernorm_epsilon=1e-3, use_bias_in_attn_linear=False, intermediate_size=80
    )
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-5
    assert theirs.config.attention_bias is False
    assert theirs.config.layer_norm_eps == 1e-3
