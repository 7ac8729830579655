"""GPT-2 and the dense form of GPT-3."""

from collections.abc import Mapping
from typing import Any

from neox.checkpoint.huggingface.family import Family, Module, shared
from neox.checkpoint.huggingface.fields import (
    Activation,
    AllHeads,
    Always,
    Field,
    Only,
    Opposite,
    Plain,
    Positions,
    Width,
)
from neox.checkpoint.huggingface.layouts import Same, StackedQKV, Transposed
from neox.config import ModelConfig


def _modules(config: ModelConfig) -> Mapping[str, Module]:
    block = "transformer.h.{layer}."
    turned = Transposed(Same())
    return {
        "word_embeddings": Module.at("transformer.wte"),
        "position_embeddings": Module.at("transformer.wpe"),
        "input_layernorm": Module.at(block + "ln_1"),
        "attention.query_key_value": Module.at(block + "attn.c_attn", layout=Transposed(StackedQKV.of(config))),
        "attention.dense": Module.at(block + "attn.c_proj", layout=turned),
        "post_attention_layernorm": Module.at(block + "ln_2"),
        "mlp.linear1": Module.at(block + "mlp.c_fc", layout=turned),
        "mlp.linear2": Module.at(block + "mlp.c_proj", layout=turned),
        "norm": Module.at("transformer.ln_f"),
        "final_linear": Module.at("lm_head"),
    }


class _EmbeddingDropout(Field):
    """Dropout of the embeddings, which is that of the residual here; absent, it is 0.1 in transformers."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {"embd_pdrop": config.hidden_dropout}


GPT2 = Family(
    name="gpt2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    modules=_modules,
    fields=(
        *shared(hidden="n_embd", layers="n_layer", heads="n_head"),
        Width("n_inner", multiple=4),
        Always("pos_emb", "learned"),
        Always("opt_pos_emb_offset", 0),
        Positions("n_positions", default=1024),
        Always("norm", "layernorm"),
        Always("embedding_norm", False),
        Plain("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Activation("activation_function", default="gelu_new"),
        Always("gpt_j_residual", False),
        AllHeads(),
        Always("sliding_window_width", None),
        Always("use_bias_in_attn_linear", True),
        Always("use_bias_in_mlp", True),
        Only("scale_attn_weights", True, True),
        # Scaling by depth and the order of its rounding.
        Only("scale_attn_by_inverse_layer_idx", False, False),
        Only("reorder_and_upcast_attn", False, False),
        Opposite("tie_word_embeddings", "no_weight_tying", True),
        Plain("resid_pdrop", "hidden_dropout", 0.1),
        _EmbeddingDropout(),
        Plain("attn_pdrop", "attention_dropout", 0.1),
        Plain("initializer_range", "init_method_std", 0.02),
    ),
)
