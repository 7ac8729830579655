"""The model of the checkpoint that `load` names: what the files leave out is taken from it, what they say is compared.

Reading a checkpoint is the caller's; here is what becomes of its keys.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from neox.config.model import ModelConfig
from neox.config.problems import Problems
from neox.config.yaml_files import Merged

_ALWAYS = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "norm", "use_qk_layernorm"),
    *("embedding_norm", "pos_emb", "sliding_window_width", "no_weight_tying", "activation", "gpt_j_residual"),
    *("gpt_j_tied", "use_bias_in_attn_linear", "use_bias_in_mlp", "padded_vocab_size", "moe_num_experts"),
)
_OF_EXPERTS = ("moe_expert_interval", "moe_top_k", "moe_router_type", "moe_normalize_weights")
_OF_TRAINING = ("moe_aux_loss_coeff",)
"""Taken from the checkpoint where they are absent; a run may set them otherwise."""
_BY_NORM = {"layernorm": "layernorm_epsilon", "rmsnorm": "rms_norm_epsilon", "scalenorm": "scalenorm_epsilon"}
_BY_POSITIONS = {
    "rotary": ("rotary_pct", "rotary_emb_base", "rope_scaling"),
    "learned": ("max_position_embeddings", "opt_pos_emb_offset"),
}
_LENGTHS = ("seq_length", "max_position_embeddings")
"""Taken from the checkpoint where they are absent; rotary positions may go on to others."""


@dataclass(frozen=True)
class LoadedModel:
    """What a checkpoint says of its model.

    Attributes:
        keys: flat keys; those of a description that is whole are all there, None where one is not set.
        place: what says so, for messages: a file or folder.
        tokenizer: keys of the tokenizer that lies with it, used where the files name none.
        batch: sizes of the batch of a run that is elastic and goes on, used where the files name none.
    """

    keys: dict[str, Any]
    place: str
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    batch: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def whole(cls, model: ModelConfig, place: str, tokenizer: Mapping[str, str]) -> "LoadedModel":
        """Everything of a resolved model that another must have in common with it."""
        keys = {key: getattr(model, key) for key in (*_ALWAYS, *_LENGTHS)}
        keys["intermediate_size"] = 3 * model.mlp_inner_width if model.is_gated else model.mlp_inner_width
        keys |= {key: getattr(model, key) for norm, key in _BY_NORM.items() if model.norm.endswith(norm)}
        keys |= {key: getattr(model, key) for key in _BY_POSITIONS.get(model.pos_emb, ())}
        if model.has_experts:
            keys |= {key: getattr(model, key) for key in (*_OF_EXPERTS, *_OF_TRAINING)}
        if model.activation == "gelu":
            keys["bias_gelu_fusion"] = model.bias_gelu_fusion
        return cls(keys, place, tokenizer)


ModelReader = Callable[[Mapping[str, Any]], LoadedModel | None]
"""Opens what `load` and `iteration` of flat keys name; None where there is nothing to read a model from."""


def take_absent_keys(merged: Merged, loaded: LoadedModel) -> None:
    """Set the keys that no file and no override sets, with the checkpoint as their place."""
    values = merged.values
    names_none = not any(values.get(key) for key in ("tokenizer_type", "vocab_file"))
    for key, value in {**loaded.keys, **loaded.batch, **(loaded.tokenizer if names_none else {})}.items():
        stated = (key, "expansion_factor") if key == "intermediate_size" else (key,)
        if value is not None and all(values.get(name) is None for name in stated):
            values[key] = deepcopy(value)
            merged.sources[key] = f"load {loaded.place}"


def compare_models(model: ModelConfig, loaded: LoadedModel, problems: Problems) -> None:
    """Note every key in which the model of the configuration is not the checkpoint's."""
    for key, theirs in loaded.keys.items():
        ours = getattr(model, key)
        if _agree(model, key, ours, theirs):
            continue
        mend = "remove the key" if theirs is None else f"remove the key, or set it to {_shown(theirs)}"
        problems.add(key, f"{_shown(ours)} is not what {loaded.place} has, {_shown(theirs)}; {mend}")


def _agree(model: ModelConfig, key: str, ours: Any, theirs: Any) -> bool:
    if key == "intermediate_size":  # whose rounding to mlp_multiple_of changes nothing that is built
        return model.mlp_inner_width == (theirs // 3 if model.is_gated else theirs)
    if key in _OF_TRAINING:
        return True
    if key in _LENGTHS and not (key == "max_position_embeddings" and model.pos_emb == "learned"):
        return True
    if key == "rope_scaling" and theirs is None:
        return True  # how a model is taken to longer sequences than it was trained on
    return bool(ours == theirs)


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return str(value).lower() if isinstance(value, bool) else str(value)
