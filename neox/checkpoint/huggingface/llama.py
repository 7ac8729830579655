"""LLaMA 1 to 3, Code Llama, and Mistral, which differs by its window and never has biases."""

from collections.abc import Mapping

from neox.checkpoint.huggingface.family import Family, Module, shared
from neox.checkpoint.huggingface.fields import (
    Always,
    Field,
    GatedActivation,
    HeadSize,
    Opposite,
    Plain,
    Positions,
    Width,
    Window,
)
from neox.checkpoint.huggingface.layouts import SeparateQKV, Stacked
from neox.checkpoint.huggingface.rope import Rotary
from neox.config import ModelConfig


def dense_modules(config: ModelConfig) -> Mapping[str, Module]:
    """The table of tensors of a model without experts."""
    block = "model.layers.{layer}."
    attention, mlp = block + "self_attn.", block + "mlp."
    return {
        "word_embeddings": Module.at("model.embed_tokens"),
        "input_layernorm": Module.at(block + "input_layernorm"),
        "attention.query_key_value": Module.at(
            attention + "q_proj", attention + "k_proj", attention + "v_proj", layout=SeparateQKV.of(config)
        ),
        "attention.dense": Module.at(attention + "o_proj"),
        "post_attention_layernorm": Module.at(block + "post_attention_layernorm"),
        "mlp.linear1": Module.at(mlp + "up_proj", mlp + "gate_proj", layout=Stacked()),
        "mlp.linear2": Module.at(mlp + "down_proj"),
        "norm": Module.at("model.norm"),
        "final_linear": Module.at("lm_head"),
    }


ALL: tuple[Field, ...] = (
    HeadSize(),
    Width(gated=True),
    GatedActivation(),
    Always("norm", "rmsnorm"),
    Always("embedding_norm", False),
    Always("gpt_j_residual", False),
    Opposite("tie_word_embeddings", "no_weight_tying", False),
    Plain("attention_dropout", "attention_dropout", 0.0),
    Plain("initializer_range", "init_method_std", 0.02),
)
"""What Mixtral too has in common with them."""
_BOTH: tuple[Field, ...] = (*shared(), *ALL, Rotary(), Plain("rms_norm_eps", "rms_norm_epsilon", 1e-6))

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    modules=dense_modules,
    fields=(
        *_BOTH,
        Positions(),
        Plain("num_key_value_heads", "num_kv_heads", None),
        Always("sliding_window_width", None),
        Plain("attention_bias", "use_bias_in_attn_linear", False),
        Plain("mlp_bias", "use_bias_in_mlp", False),
    ),
)

MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    prefix="model.",
    modules=dense_modules,
    fields=(
        *_BOTH,
        Positions(default=4096 * 32),
        Plain("num_key_value_heads", "num_kv_heads", 8),
        Window(),
        Always("use_bias_in_attn_linear", False),
        Always("use_bias_in_mlp", False),
    ),
)
