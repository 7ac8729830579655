"""GPT-NeoX models in Hugging Face's words: names of tensors and keys of config.json.

`transformers` 5 keeps the rotary settings in `rope_parameters` and calls the type `dtype`; version 4 reads
`rotary_pct`, `rotary_emb_base` and `torch_dtype`. Both sets are written, either is read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox.config import ModelConfig
from neox.errors import CheckpointError

MODEL_TYPE = "gpt_neox"
ARCHITECTURE = "GPTNeoXForCausalLM"
PREFIX = "gpt_neox."

DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bfloat16": "bfloat16"}
TANH_GELUS = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")
"""Names in transformers of the tanh approximation; the first is the one that is written."""

_MODULES = {"mlp.linear1": "mlp.dense_h_to_4h", "mlp.linear2": "mlp.dense_4h_to_h"}


def huggingface_name(name: str, *, num_layers: int) -> str:
    """Return the name on disk of a parameter given by its canonical name.

    `embed_out` is the head's name on disk in transformers 4 and 5 (5 calls it `lm_head` in memory).
    """
    _, index, local = name.split(".", 2)
    module, _, kind = local.rpartition(".")
    if module == "word_embeddings":
        return f"{PREFIX}embed_in.{kind}"
    if module == "final_linear":
        return f"embed_out.{kind}"
    if module == "norm":
        return f"{PREFIX}final_layer_norm.{kind}"
    layer = int(index) - 2
    assert 0 <= layer < num_layers, f"{name} is no parameter of a decoder of {num_layers} layers"
    return f"{PREFIX}layers.{layer}.{_MODULES.get(module, module)}.{kind}"


def check_expressible(config: ModelConfig) -> None:
    """Make sure that transformers' GPTNeoX can compute this model.

    Raises:
        CheckpointError: it cannot; names the key.
    """
    problem = ""
    if config.pos_emb != "rotary":
        problem = f"pos_emb: {config.pos_emb}; GPTNeoX in transformers has rotary positions only"
    elif not config.use_bias_in_mlp:
        problem = "use_bias_in_mlp: false; GPTNeoX in transformers always has biases in the MLP"
    if problem:
        raise CheckpointError(f"cannot be exported to Hugging Face: {problem}")


def huggingface_config(config: ModelConfig, *, dtype: str, tokens: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        config: the model; `padded_vocab_size` must be resolved.
        dtype: type of the weights, `float16` say.
        tokens: `bos_token_id`, `eos_token_id` and, where there is one, `pad_token_id`.
    """
    assert config.padded_vocab_size is not None, "the vocabulary is resolved before a model is exported"
    base = float(config.rotary_emb_base)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": TANH_GELUS[0] if config.bias_gelu_fusion else "gelu",
        "layer_norm_eps": config.layernorm_epsilon,
        "use_parallel_residual": config.gpt_j_residual,
        "attention_bias": config.use_bias_in_attn_linear,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": base,
            "partial_rotary_factor": config.rotary_pct,
        },
        "rotary_pct": config.rotary_pct,
        "rotary_emb_base": base,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": not config.no_weight_tying,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        **tokens,
    }


def flat_keys(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Our configuration keys for the model that a config.json describes.

    Args:
        content: the config.json.
        path: where it was read, for messages.

    Raises:
        CheckpointError: it is another architecture, or uses what cannot be computed here.
    """
    _check_readable(content, path)
    rope = content.get("rope_parameters") or {}
    positions = content.get("max_position_embeddings", 2048)
    # Defaults are those of transformers' GPTNeoXConfig.
    return {
        "num_layers": content["num_hidden_layers"],
        "hidden_size": content["hidden_size"],
        "num_attention_heads": content["num_attention_heads"],
        "intermediate_size": content["intermediate_size"],
        "seq_length": positions,
        "max_position_embeddings": positions,
        "norm": "layernorm",
        "layernorm_epsilon": content.get("layer_norm_eps", 1e-5),
        "pos_emb": "rotary",
        "rotary_pct": rope.get("partial_rotary_factor", content.get("rotary_pct", 0.25)),
        "rotary_emb_base": rope.get("rope_theta", content.get("rotary_emb_base", 10000)),
        "no_weight_tying": not content.get("tie_word_embeddings", False),
        "gpt_j_residual": content.get("use_parallel_residual", True),
        "activation": "gelu",
        "bias_gelu_fusion": content.get("hidden_act", "gelu") in TANH_GELUS,
        "use_bias_in_attn_linear": content.get("attention_bias", True),
        "hidden_dropout": content.get("hidden_dropout", 0.0),
        "attention_dropout": content.get("attention_dropout", 0.0),
        "init_method_std": content.get("initializer_range", 0.02),
        "padded_vocab_size": content["vocab_size"],
        "precision": _precision(content),
    }


def _check_readable(content: Mapping[str, Any], path: Path) -> None:
    if content.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{path}: model_type is {content.get('model_type')}; only {MODEL_TYPE} can be read")
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    for key in needed:
        if key not in content:
            raise CheckpointError(f"{path}: has no {key}; the file is not whole, copy it again")
    activation = content.get("hidden_act", "gelu")
    if activation not in ("gelu", *TANH_GELUS):
        raise CheckpointError(f"{path}: hidden_act is {activation}; only gelu and {', '.join(TANH_GELUS)} can be read")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{path}: rotary positions are of type {kind}; only default can be read")


def _precision(content: Mapping[str, Any]) -> str:
    name = content.get("dtype", content.get("torch_dtype")) or "float32"
    return {full: short for short, full in DTYPE_NAMES.items()}.get(name, "fp32")
