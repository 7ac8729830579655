"""The keys that make a model one of a family; sizes and training are the test's own."""

from typing import Any

LLAMA: dict[str, Any] = {
    "pos_emb": "rotary",
    "norm": "rmsnorm",
    "rms_norm_epsilon": 1e-5,
    "activation": "swiglu",
    "intermediate_size": 3 * 72,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "no_weight_tying": True,
}
GQA: dict[str, Any] = LLAMA | {"num_kv_heads": 2}
FALCON: dict[str, Any] = {
    "pos_emb": "rotary",
    "gpt_j_residual": True,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
}
LLAMA3_SCALING: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

MIXTRAL: dict[str, Any] = GQA | {
    "rotary_emb_base": 1000000,
    "moe_num_experts": 5,
    "moe_top_k": 2,
    "moe_router_type": "topk",
    "moe_aux_loss_coeff": 0.02,
}

KEYS: dict[str, dict[str, Any]] = {
    "neox": {"pos_emb": "rotary", "rotary_pct": 0.25, "gpt_j_residual": True, "no_weight_tying": True},
    "llama": GQA | {"rotary_emb_base": 500000, "rope_scaling": LLAMA3_SCALING},
    "mistral": GQA | {"sliding_window_width": 7},
    "mixtral": MIXTRAL,
    "falcon": FALCON | {"num_kv_heads": 2},
    "palm": FALCON | {"gpt_j_tied": True, "num_kv_heads": 1, "activation": "swiglu", "intermediate_size": 3 * 64},
    "opt": {"pos_emb": "learned", "opt_pos_emb_offset": 2, "max_position_embeddings": 42, "activation": "relu"},
    "gpt2": {"pos_emb": "learned", "bias_gelu_fusion": True},
    "bloom": {"pos_emb": "alibi", "embedding_norm": True, "bias_gelu_fusion": True},
}
