"""Falcon with rotary positions: 7B (one norm, one head of keys) and 40B (two norms, groups)."""

from collections.abc import Mapping
from typing import Any

from neox.checkpoint.huggingface.family import Family, Module, shared
from neox.checkpoint.huggingface.fields import (
    Activation,
    Always,
    Biases,
    Field,
    Only,
    Opposite,
    Plain,
    Positions,
    Width,
)
from neox.checkpoint.huggingface.layouts import GroupedQKV
from neox.checkpoint.huggingface.rope import Rotary
from neox.config import ModelConfig


def _modules(config: ModelConfig) -> Mapping[str, Module]:
    block = "transformer.h.{layer}."
    return {
        "word_embeddings": Module.at("transformer.word_embeddings"),
        "input_layernorm": Module.at(block + ("input_layernorm" if config.gpt_j_tied else "ln_attn")),
        "attention.query_key_value": Module.at(block + "self_attention.query_key_value", layout=GroupedQKV.of(config)),
        "attention.dense": Module.at(block + "self_attention.dense"),
        "post_attention_layernorm": Module.at(block + "ln_mlp"),
        "mlp.linear1": Module.at(block + "mlp.dense_h_to_4h"),
        "mlp.linear2": Module.at(block + "mlp.dense_4h_to_h"),
        "norm": Module.at("transformer.ln_f"),
        "final_linear": Module.at("lm_head"),
    }


class _Decoder(Field):
    """Norms of a block and heads of keys: four of their keys, of which the newer design ignores one.

    The older design has one norm, and one head of keys or all; the newer any number of both.
    """

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        single = config.num_kv_heads == 1
        older = config.gpt_j_tied and (single or not config.is_grouped)
        return {
            "new_decoder_architecture": not older,
            "num_ln_in_parallel_attn": 1 if config.gpt_j_tied else 2,
            "multi_query": single and config.is_grouped,
            "num_kv_heads": config.num_kv_heads,
        }

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        heads = content.get("num_kv_heads")
        if content.get("new_decoder_architecture"):
            return {"num_kv_heads": heads, "gpt_j_tied": content.get("num_ln_in_parallel_attn") == 1}
        return {"num_kv_heads": 1 if content.get("multi_query", True) else None, "gpt_j_tied": True}


FALCON = Family(
    name="falcon",
    model_type="falcon",
    architecture="FalconForCausalLM",
    prefix="transformer.",
    modules=_modules,
    fields=(
        *shared(),
        Width("ffn_hidden_size", multiple=4),
        Positions(),
        Rotary(),
        Only("alibi", False, False),
        Only("parallel_attn", True, True),
        _Decoder(),
        Always("norm", "layernorm"),
        Always("embedding_norm", False),
        Plain("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Activation("activation"),
        Always("gpt_j_residual", True),
        Always("sliding_window_width", None),
        Biases("bias", "use_bias_in_mlp", False),
        Opposite("tie_word_embeddings", "no_weight_tying", True),
        Plain("hidden_dropout", "hidden_dropout", 0.0),
        Plain("attention_dropout", "attention_dropout", 0.0),
        Plain("initializer_range", "init_method_std", 0.02),
    ),
)
