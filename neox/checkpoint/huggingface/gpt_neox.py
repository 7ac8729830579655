"""GPT-NeoX-20B, Pythia and their kind."""

from collections.abc import Mapping

from neox.checkpoint.huggingface.family import Family, Module, shared
from neox.checkpoint.huggingface.fields import Activation, AllHeads, Always, Opposite, Plain, Positions, Width
from neox.checkpoint.huggingface.rope import Rotary
from neox.config import ModelConfig

HEADS = ("embed_out.weight", "lm_head.weight")
"""The head's name on disk in transformers 4 and 5, and what 5 calls it in memory."""


def _modules(config: ModelConfig) -> Mapping[str, Module]:
    block = "gpt_neox.layers.{layer}."
    return {
        "word_embeddings": Module.at("gpt_neox.embed_in"),
        "input_layernorm": Module.at(block + "input_layernorm"),
        "attention.query_key_value": Module.at(block + "attention.query_key_value"),
        "attention.dense": Module.at(block + "attention.dense"),
        "post_attention_layernorm": Module.at(block + "post_attention_layernorm"),
        "mlp.linear1": Module.at(block + "mlp.dense_h_to_4h"),
        "mlp.linear2": Module.at(block + "mlp.dense_4h_to_h"),
        "norm": Module.at("gpt_neox.final_layer_norm"),
        "final_linear": Module.at("embed_out"),
    }


GPT_NEOX = Family(
    name="neox",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    modules=_modules,
    fields=(
        *shared(),
        Width(),
        Positions(),
        Rotary(base="rotary_emb_base", share="rotary_pct", default_share=0.25),
        Always("norm", "layernorm"),
        Always("embedding_norm", False),
        Plain("layer_norm_eps", "layernorm_epsilon", 1e-5),
        Activation(),
        Plain("use_parallel_residual", "gpt_j_residual", True),
        Always("gpt_j_tied", False),
        AllHeads(),
        Always("sliding_window_width", None),
        Plain("attention_bias", "use_bias_in_attn_linear", True),
        Always("use_bias_in_mlp", True),
        Opposite("tie_word_embeddings", "no_weight_tying", False),
        Plain("hidden_dropout", "hidden_dropout", 0.0),
        Plain("attention_dropout", "attention_dropout", 0.0),
        Plain("initializer_range", "init_method_std", 0.02),
    ),
)
