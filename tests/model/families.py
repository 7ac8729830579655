"""Small models, one for each kind of attention and positions."""

from typing import Any

import torch
from weight_sources import RandomWeights

from neox.config import Config, config_from_dict
from neox.model.build import build_decoder
from neox.model.layers import Decoder

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "seq_length": 40,
    "padded_vocab_size": 61,
    "pos_emb": "rotary",
    "train_micro_batch_size_per_gpu": 1,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_kv_heads": 2},
    "mqa_llama3": {"num_kv_heads": 1, "rope_scaling": LLAMA3, "norm": "rmsnorm", "activation": "swiglu"},
    "window": {"sliding_window_width": 4},
    "gqa_window_half": {"num_kv_heads": 3, "sliding_window_width": 3, "rotary_pct": 0.5},
    "alibi": {"pos_emb": "alibi"},
    "alibi_gqa_window": {"pos_emb": "alibi", "num_kv_heads": 2, "sliding_window_width": 4},
    "dynamic_gqa": {"num_kv_heads": 2, "rope_scaling": DYNAMIC},
    "dynamic_window": {"rope_scaling": DYNAMIC, "sliding_window_width": 5},
    "qk_layernorm_gqa": {"num_kv_heads": 3, "use_qk_layernorm": True},
    "qk_rmsnorm": {"use_qk_layernorm": True, "norm": "rmsnorm"},
    "learned": {"pos_emb": "learned"},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "none": {"pos_emb": "none"},
}


def family_config(name: str, **changes: Any) -> Config:
    return config_from_dict(BASE | FAMILIES[name] | changes, world_size=None)


def family(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    """The model with random weights, in eval mode."""
    config = family_config(name, **changes).model
    return build_decoder(config, source=RandomWeights(config).weight, dtype=dtype).eval()
