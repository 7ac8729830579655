"""Rules of the model: sizes that must fit each other, and values that follow from others."""

import math
from typing import Any

from neox.config.deepspeed import DeepSpeedConfig
from neox.config.model import ModelConfig
from neox.config.problems import Problems

_DENSE_ATTENTION = ("global", "flash")


def resolve_model(model: ModelConfig, deepspeed: DeepSpeedConfig, problems: Problems) -> ModelConfig:
    """Fill in what is not given, and note sizes that do not fit."""
    model = model.model_copy(
        update={
            "intermediate_size": _mlp_width(model, problems),
            "max_position_embeddings": model.max_position_embeddings or model.seq_length,
            "precision": _precision(model, deepspeed, problems),
        }
    )
    _check_heads(model, problems)
    if model.seq_length > model.max_position_embeddings:
        problems.add(
            "seq_length",
            f"{model.seq_length} is longer than max_position_embeddings {model.max_position_embeddings}; "
            f"set max_position_embeddings: {model.seq_length}",
        )
    return model.model_copy(update={"attention_types": _attention_types(model, problems)})


def _mlp_width(model: ModelConfig, problems: Problems) -> int:
    if model.intermediate_size and model.expansion_factor:
        problems.add("expansion_factor", "set together with intermediate_size; keep one of them")
    width = model.intermediate_size or int((model.expansion_factor or 4) * model.hidden_size)
    return model.mlp_multiple_of * math.ceil(width / model.mlp_multiple_of)


def _precision(model: ModelConfig, deepspeed: DeepSpeedConfig, problems: Problems) -> str:
    enabled = [
        (key, name)
        for key, name in (("fp16", "fp16"), ("bf16", "bfloat16"))
        if (getattr(deepspeed, key) or {}).get("enabled")
    ]
    if len(enabled) == 2:
        problems.add("bf16.enabled", "fp16 is enabled too; enable one of them")
    if "precision" not in model.model_fields_set:
        return enabled[0][1] if enabled else "fp32"
    for key, name in enabled:
        if name != model.precision:
            problems.add(f"{key}.enabled", f"contradicts precision {model.precision!r}; set precision: {name}")
    return model.precision


def _check_heads(model: ModelConfig, problems: Problems) -> None:
    heads, width = model.num_attention_heads, model.hidden_size
    if width % heads:
        nearest = max(heads, round(width / heads) * heads)
        problems.add("hidden_size", f"{width} is not divisible by num_attention_heads {heads}; nearest: {nearest}")
    elif model.pos_emb == "rotary" and (model.rotary_ndims % 2 or not model.rotary_ndims):
        pairs = min(max(1, round(model.rotary_ndims / 2)), model.head_dim // 2)
        mend = f"rotary_pct: {2 * pairs / model.head_dim:g}" if pairs else "a head size of 2 or more"
        problems.add(
            "rotary_pct",
            f"{model.rotary_pct:g} of head size {model.head_dim} is {model.rotary_ndims} dimensions, and "
            f"rotation needs pairs; set {mend}",
        )


def _attention_types(model: ModelConfig, problems: Problems) -> tuple[str, ...]:
    if model.attention_config is None:
        return ("global",) * model.num_layers
    types = _expand(model.attention_config, model.num_layers)
    if types is None:
        problems.add("attention_config", "expected a list such as [[[global], 12]] or one name for each layer")
        return ()
    for name in sorted(set(types) - set(_DENSE_ATTENTION)):
        problems.add("attention_config", f"{name!r} is not supported yet; supported: {', '.join(_DENSE_ATTENTION)}")
    if len(types) != model.num_layers:
        problems.add("attention_config", f"describes {len(types)} layers, and num_layers is {model.num_layers}")
    return types


def _expand(config: tuple[Any, ...], num_layers: int) -> tuple[str, ...] | None:
    """Spell out [[[a, b], 2], [[c], all]]: the group [a, b] twice, then c for the layers that are left."""
    if all(isinstance(item, str) for item in config):
        return tuple(config)
    types: list[str] = []
    for item in config:
        match item:
            case [[*names], int(repeat)] if all(isinstance(name, str) for name in names):
                types += names * repeat
            case [[*names], "all"] if names and all(isinstance(name, str) for name in names):
                types += names * ((num_layers - len(types)) // len(names))
            case _:
                return None
    return tuple(types)
