"""Every family against its class in transformers: the same random weights, logits and gradients."""

from itertools import product
from typing import Any

import pytest
import torch
from model_families import FALCON, GQA, KEYS, LLAMA, LLAMA3_SCALING
from torch.nn.functional import cross_entropy
from weight_sources import RandomWeights

from neox.checkpoint.huggingface import FAMILIES, HuggingFaceReader, export_huggingface
from neox.config import config_from_dict
from neox.model.build import build_decoder
from neox.model.loss import Targets

SHAPE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "seq_length": 40,
    "padded_vocab_size": 96,
    "train_micro_batch_size_per_gpu": 1,
}
NEOX = {"num_attention_heads": 3, "pos_emb": "rotary"}

NEOX_CASES = {
    f"neox {parallel=} {share=} {tanh=} {untied=}": NEOX
    | {"gpt_j_residual": parallel, "rotary_pct": share, "bias_gelu_fusion": tanh, "no_weight_tying": untied}
    for parallel, share, tanh, untied in product((True, False), (0.25, 1.0), (True, False), (True, False))
}
CASES: dict[str, dict[str, Any]] = NEOX_CASES | {
    "neox other numbers": NEOX
    | {
        "rotary_emb_base": 500,
        "layernorm_epsilon": 1e-3,
        "use_bias_in_attn_linear": False,
        "intermediate_size": 80,
        "activation": "silu",
        "rotary_pct": 0.5,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "llama": LLAMA,
    "llama gqa": GQA | {"rotary_emb_base": 500000},
    "llama mqa with biases, tied": LLAMA
    | {"num_kv_heads": 1, "use_bias_in_attn_linear": True, "use_bias_in_mlp": True, "no_weight_tying": False},
    "llama geglu": LLAMA | {"activation": "geglu"},
    "llama linear": GQA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama dynamic": GQA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "seq_length": 24},
    "llama yarn": GQA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "llama llama3": LLAMA | {"rope_scaling": LLAMA3_SCALING},
    "mistral": KEYS["mistral"],
    "falcon 7b": FALCON | {"num_kv_heads": 1, "gpt_j_tied": True},
    "falcon 40b": KEYS["falcon"],
    "falcon gqa with one norm and biases": FALCON
    | {"num_kv_heads": 3, "gpt_j_tied": True, "use_bias_in_attn_linear": True, "use_bias_in_mlp": True},
    "opt": KEYS["opt"],
    "bloom": KEYS["bloom"],
    "gpt2": KEYS["gpt2"],
    "gpt2 untied and narrow": KEYS["gpt2"]
    | {"no_weight_tying": True, "intermediate_size": 80, "activation": "relu", "bias_gelu_fusion": False},
}
LONGER: dict[str, dict[str, Any]] = {
    # Beyond the length trained on, where this scaling begins to act: transformers sees it from the tokens.
    "llama dynamic": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 24},
        "seq_length": 40,
    },
}
TOLERANCE = 1e-5
"""Of logits, loss and every gradient, all of them of order 1."""


def build_both(tmp_path, name):
    """Our model and transformers', with the same random weights."""
    from transformers import AutoModelForCausalLM

    config = config_from_dict(SHAPE | CASES[name]).model
    weights = RandomWeights(config, seed=3)
    longer = config_from_dict(SHAPE | CASES[name] | LONGER.get(name, {})).model
    ours = build_decoder(longer, source=weights.weight)
    export_huggingface(weights, config, tmp_path / "hf", dtype=torch.float32)
    return config, weights, ours, AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(tmp_path, name):
    config, weights, ours, theirs = build_both(tmp_path, name)
    family = FAMILIES[name.split()[0]]
    assert type(theirs).__name__ == family.architecture
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    tokens, labels = torch.randint(96, (2, 2, 40), generator=torch.Generator().manual_seed(0))
    expected = theirs(tokens).logits
    assert expected.std() > 0.3
    assert (ours(tokens) - expected).abs().max() <= TOLERANCE

    loss = ours(tokens, Targets(labels, torch.full(labels.shape, 1 / labels.numel())))
    their_loss = cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(their_loss.item(), abs=TOLERANCE)
    loss.backward()
    their_loss.backward()
    their_gradients = {their_name: p.grad for their_name, p in theirs.named_parameters()}
    if family.name == "neox" and config.no_weight_tying:
        their_gradients["embed_out.weight"] = their_gradients.pop("lm_head.weight")
    for our_name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, our_name
        places, layout = family.locate(our_name, config)
        for place, gradient in zip(places, layout.split(parameter.grad), strict=True):
            assert (gradient - their_gradients.pop(place)).abs().max() <= TOLERANCE, place
    assert not their_gradients

    reader = HuggingFaceReader(tmp_path / "hf")
    assert all(torch.equal(reader.tensor(our_name), weights.tensor(our_name)) for our_name in weights.names())
    assert reader.names() == weights.names()
