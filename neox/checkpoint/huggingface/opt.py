"""OPT with norms before attention, which is all sizes but 350M."""

from collections.abc import Mapping
from typing import Any

from neox.checkpoint.huggingface.family import Family, Module, shared
from neox.checkpoint.huggingface.fields import (
    Activation,
    AllHeads,
    Always,
    Biases,
    Field,
    Only,
    Opposite,
    Plain,
    Positions,
    Width,
)
from neox.checkpoint.huggingface.layouts import SeparateQKV
from neox.config import ModelConfig


def _modules(config: ModelConfig) -> Mapping[str, Module]:
    decoder = "model.decoder."
    block = decoder + "layers.{layer}."
    attention = block + "self_attn."
    return {
        "word_embeddings": Module.at(decoder + "embed_tokens"),
        "position_embeddings": Module.at(decoder + "embed_positions"),
        "input_layernorm": Module.at(block + "self_attn_layer_norm"),
        "attention.query_key_value": Module.at(
            attention + "q_proj", attention + "k_proj", attention + "v_proj", layout=SeparateQKV.of(config)
        ),
        "attention.dense": Module.at(attention + "out_proj"),
        "post_attention_layernorm": Module.at(block + "final_layer_norm"),
        "mlp.linear1": Module.at(block + "fc1"),
        "mlp.linear2": Module.at(block + "fc2"),
        "norm": Module.at(decoder + "final_layer_norm"),
        "final_linear": Module.at("lm_head"),
    }


class _NoProjection(Field):
    """Embeddings are as wide as the residual stream."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {"word_embed_proj_dim": config.hidden_size}

    def objection(self, content: Mapping[str, Any]) -> str:
        """See Field."""
        width, hidden = content.get("word_embed_proj_dim"), content.get("hidden_size")
        return (
            "" if width in (None, hidden) else f"word_embed_proj_dim is {width}; only hidden_size {hidden} can be read"
        )


OPT = Family(
    name="opt",
    model_type="opt",
    architecture="OPTForCausalLM",
    prefix="model.",
    modules=_modules,
    fields=(
        *shared(),
        Width("ffn_dim"),
        Always("pos_emb", "learned"),
        Always("opt_pos_emb_offset", 2),
        Positions(offset=2),
        Always("norm", "layernorm"),
        Always("embedding_norm", False),
        Always("layernorm_epsilon", 1e-5),
        Activation("activation_function", default="relu"),
        Always("gpt_j_residual", False),
        AllHeads(),
        Always("sliding_window_width", None),
        Only("do_layer_norm_before", True, True),
        Only("_remove_final_layer_norm", False, False),
        Only("layer_norm_elementwise_affine", True, True),
        _NoProjection(),
        Biases("enable_bias", "use_bias_in_mlp", True),
        Opposite("tie_word_embeddings", "no_weight_tying", True),
        Plain("dropout", "hidden_dropout", 0.1),
        Plain("attention_dropout", "attention_dropout", 0.0),
        Plain("init_std", "init_method_std", 0.02),
    ),
)
