"""Every family against its class in transformers: the same random weights, logits and gradients."""

from itertools import product
from typing import Any

import pytest
import torch
from model_families import FALCON, GQA, KEYS, LLAMA, LLAMA3_SCALING, MIXTRAL
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
    "mixtral": MIXTRAL,
    "mixtral with a window, biased against balance": MIXTRAL
    | {"sliding_window_width": 6, "moe_num_experts": 8, "moe_top_k": 3, "moe_aux_loss_coeff": 1.5},
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
    """Our model and transformers', with the same random weights, both in float64.

    What is left to differ is what one of the two computes in fp32: norms and biases of positions there, the softmax of
    the loss here. In fp32 throughout, the rounding of every product would decide: some of these models enlarge it to
    1e-5.
    """
    from transformers import AutoModelForCausalLM

    config = config_from_dict(SHAPE | CASES[name]).model
    weights = RandomWeights(config, seed=3)
    longer = config_from_dict(SHAPE | CASES[name] | LONGER.get(name, {})).model
    ours = build_decoder(longer, source=weights.weight)
    export_huggingface(weights, config, tmp_path / "hf", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    if config.has_experts:
        theirs.set_experts_implementation("eager")  # the default has no kernel for float64
    return config, weights, ours.double(), theirs.double()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(tmp_path, name):
    config, weights, ours, theirs = build_both(tmp_path, name)
    family = FAMILIES[name.split()[0]]
    assert type(theirs).__name__ == family.architecture
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    tokens, labels = torch.randint(96, (2, 2, 40), generator=torch.Generator().manual_seed(0))
    expected, router_loss = of_transformers(theirs, tokens, config)
    assert expected.std() > 0.3
    assert (ours(tokens) - expected).abs().max() <= TOLERANCE

    loss = ours(tokens, Targets(labels, torch.full(labels.shape, 1 / labels.numel())))
    their_loss = cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(their_loss.item(), abs=TOLERANCE)
    loss.backward()
    (their_loss + router_loss).backward()
    their_gradients = as_on_disk({their_name: p.grad for their_name, p in theirs.named_parameters()})
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


def of_transformers(theirs, tokens, config):
    """Their logits, and what the routers of Mixtral add to the loss: each its own, though theirs pool all layers."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    if not config.has_experts:
        return theirs(tokens).logits, 0.0
    found = theirs(tokens, output_router_logits=True)
    losses = [load_balancing_loss_func((of,), config.moe_num_experts, config.moe_top_k) for of in found.router_logits]
    return found.logits, config.moe_aux_loss_coeff * torch.stack(losses).mean()


def as_on_disk(gradients):
    """Experts apart, as in files; in memory transformers has all gates and ups in one tensor, all downs in another."""
    found = {}
    for name, gradient in gradients.items():
        place = name.replace(".mlp.", ".block_sparse_moe.") if ".mlp.gate." in name or ".experts." in name else name
        prefix, _, kind = place.rpartition(".")
        if not prefix.endswith(".experts"):
            found[place] = gradient
            continue
        for number, of_expert in enumerate(gradient):
            parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}[kind]
            for part, matrix in zip(parts, of_expert.chunk(len(parts)), strict=True):
                found[f"{prefix}.{number}.{part}.weight"] = matrix
    return found
