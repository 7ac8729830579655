"""BLOOM: ALiBi, a norm on the embeddings, biases everywhere."""

from collections.abc import Mapping

from neox.checkpoint.huggingface.family import Family, Module, shared
from neox.checkpoint.huggingface.fields import AllHeads, Always, Only, Opposite, Plain, Positions, Width
from neox.config import ModelConfig


def _modules(config: ModelConfig) -> Mapping[str, Module]:
    block = "transformer.h.{layer}."
    return {
        "word_embeddings": Module.at("transformer.word_embeddings"),
        "embedding_norm": Module.at("transformer.word_embeddings_layernorm"),
        "input_layernorm": Module.at(block + "input_layernorm"),
        "attention.query_key_value": Module.at(block + "self_attention.query_key_value"),
        "attention.dense": Module.at(block + "self_attention.dense"),
        "post_attention_layernorm": Module.at(block + "post_attention_layernorm"),
        "mlp.linear1": Module.at(block + "mlp.dense_h_to_4h"),
        "mlp.linear2": Module.at(block + "mlp.dense_4h_to_h"),
        "norm": Module.at("transformer.ln_f"),
        "final_linear": Module.at("lm_head"),
    }


BLOOM = Family(
    name="bloom",
    model_type="bloom",
    architecture="BloomForCausalLM",
    prefix="transformer.",
    modules=_modules,
    fields=(
        *shared(layers="n_layer", heads="n_head"),
        Width(None, multiple=4),
        # transformers' class has no bound on positions; the released files name the length of training.
        Positions("seq_length"),
        Always("pos_emb", "alibi"),
        Always("norm", "layernorm"),
        Always("embedding_norm", True),
        Plain("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Always("activation", "gelu"),
        Always("bias_gelu_fusion", True),
        Always("gpt_j_residual", False),
        Only("apply_residual_connection_post_layernorm", False, False),
        AllHeads(),
        Always("sliding_window_width", None),
        Always("use_bias_in_attn_linear", True),
        Always("use_bias_in_mlp", True),
        Opposite("tie_word_embeddings", "no_weight_tying", True),
        Plain("hidden_dropout", "hidden_dropout", 0.0),
        Plain("attention_dropout", "attention_dropout", 0.0),
        Plain("initializer_range", "init_method_std", 0.02),
    ),
)
