"""Rules of attention: heads that fit each other, rotary scaling, the kind of each layer."""

from typing import Any

from neox.config.keys import number_hint
from neox.config.model import ModelConfig
from neox.config.problems import Problems, did_you_mean

_DENSE_ATTENTION = ("global", "flash")
_EXOTIC_ATTENTION = (
    "local",
    "sparse_fixed",
    "sparse_variable",
    "bigbird",
    "bslongformer",
    "gmlp",
    "amlp",
    "rwkv",
    "mamba",
)
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL = {
    "linear": (),
    "dynamic": ("original_max_position_embeddings",),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": (),
}
_ELSEWHERE = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
"""What Hugging Face keeps in the same mapping and has a key of its own here."""


def resolve_attention(model: ModelConfig, problems: Problems) -> ModelConfig:
    """Note what does not fit, and spell out the kind of each layer."""
    _check_heads(model, problems)
    _check_scaling(model, problems)
    return model.model_copy(update={"attention_types": _attention_types(model, problems)})


def _check_heads(model: ModelConfig, problems: Problems) -> None:
    heads, width, kv_heads = model.num_attention_heads, model.hidden_size, model.num_kv_heads
    if heads % kv_heads:
        nearest = min((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: (abs(n - kv_heads), n))
        problems.add(
            "num_kv_heads", f"num_attention_heads {heads} is not divisible by {kv_heads}; nearest that works: {nearest}"
        )
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


def _check_scaling(model: ModelConfig, problems: Problems) -> None:
    scaling = model.rope_scaling
    if scaling is None:
        return
    if model.pos_emb != "rotary":
        problems.add(
            "rope_scaling",
            f"scales rotary positions, and pos_emb is {model.pos_emb!r}; set pos_emb: rotary or remove it",
        )
    kind = scaling.get("rope_type")
    if kind is None:
        problems.add("rope_scaling.type" if "type" in scaling else "rope_scaling", _kind_missing(scaling))
    elif not isinstance(kind, str) or kind not in _REQUIRED:
        near = "; remove rope_scaling" if kind == "default" else did_you_mean(str(kind), _REQUIRED)
        problems.add("rope_scaling.rope_type", f"{kind!r} is unknown; supported: {', '.join(_REQUIRED)}{near}")
    else:
        _check_entries(scaling, kind, problems)
        if kind == "dynamic" and model.rotary_ndims == 2:
            problems.add("rope_scaling.rope_type", "'dynamic' needs 4 rotated dimensions or more; raise rotary_pct")
        if kind == "yarn" and model.rotary_emb_base <= 1:
            base = f"{model.rotary_emb_base:g}"
            problems.add("rotary_emb_base", f"{base} is too small for rope_type yarn; set more than 1")


def _check_entries(scaling: dict[str, Any], kind: str, problems: Problems) -> None:
    known = ("rope_type", *_REQUIRED[kind], *_OPTIONAL[kind])
    for name, value in scaling.items():
        wrong = _unknown_entry(name, kind, known) if name not in known else _wrong_value(name, value)
        if wrong:
            problems.add(f"rope_scaling.{name}", wrong)
    for name in _REQUIRED[kind]:
        if name not in scaling:
            problems.add("rope_scaling", f"{name} is missing, which rope_type {kind} needs; add it")
    if kind == "llama3":
        _check_order(scaling, "low_freq_factor", "high_freq_factor", problems)
    if kind == "yarn":
        _check_order({"beta_slow": 1, "beta_fast": 32} | scaling, "beta_slow", "beta_fast", problems)


def _kind_missing(scaling: dict[str, Any]) -> str:
    if "type" in scaling:
        return f"unknown key; did you mean rope_type: {scaling['type']}?"
    return f"rope_type is missing; add one of {', '.join(_REQUIRED)}"


def _unknown_entry(name: Any, kind: str, known: tuple[str, ...]) -> str:
    if name == "type":
        return "unknown key; it is rope_type here, which is set too; remove it"
    if name in _ELSEWHERE:
        return f"unknown key; set {_ELSEWHERE[name]} beside rope_scaling instead"
    return f"unknown key for rope_type {kind}{did_you_mean(str(name), known) or '; remove it'}"


def _wrong_value(name: str, value: Any) -> str:
    """What is wrong with an entry, and what to write; empty if it is right."""
    if name == "rope_type":
        return ""
    if name == "truncate":
        return "" if isinstance(value, bool) else f"expected true or false, got {value!r}"
    if name == "original_max_position_embeddings":
        is_length = _is_number(value) and isinstance(value, int) and value > 0
        return "" if is_length else f"expected a length in tokens, got {value!r}{number_hint(value)}"
    if name == "factor":
        fits, expected = _is_number(value) and value >= 1, "a number of 1 or more"
    else:
        fits, expected = _is_number(value) and value > 0, "a number above 0"
    return "" if fits else f"expected {expected}, got {value!r}{number_hint(value)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _check_order(scaling: dict[str, Any], low: str, high: str, problems: Problems) -> None:
    """`high` must be above `low`, where both are numbers."""
    lower: Any = scaling.get(low)
    higher: Any = scaling.get(high)
    if _is_number(lower) and _is_number(higher) and lower >= higher:
        problems.add(f"rope_scaling.{high}", f"{higher:g} must be above {low} {lower:g}; change one of them")


def _attention_types(model: ModelConfig, problems: Problems) -> tuple[str, ...]:
    if model.attention_config is None:
        return ("global",) * model.num_layers
    types = _expand(model.attention_config, model.num_layers)
    if types is None:
        problems.add("attention_config", "expected a list such as [[[global], 12]] or one name for each layer")
        return ()
    for name in sorted(set(types) - set(_DENSE_ATTENTION)):
        what = "not supported yet" if name in _EXOTIC_ATTENTION else f"unknown{did_you_mean(name, _DENSE_ATTENTION)}"
        problems.add("attention_config", f"{name!r} is {what}; supported: {', '.join(_DENSE_ATTENTION)}")
    if len(types) != model.num_layers:
        told = min(len(types), model.num_layers)
        many = f"more than {told}" if len(types) > told else told
        problems.add("attention_config", f"describes {many} layers, and num_layers is {model.num_layers}")
    return types


def _expand(config: tuple[Any, ...], num_layers: int) -> tuple[str, ...] | None:
    """Spell out [[[a, b], 2], [[c], all]]: the group [a, b] twice, then c for the layers that are left."""
    if all(isinstance(item, str) for item in config):
        return tuple(config)
    types: list[str] = []
    for item in config:
        match item:
            case [[*names], int(repeat)] if all(isinstance(name, str) for name in names):
                # A repetition too many is told by the count; a huge one need not be spelt out for that.
                types += names * min(repeat, num_layers + 1)
            case [[*names], "all"] if names and all(isinstance(name, str) for name in names):
                types += names * ((num_layers - len(types)) // len(names))
            case _:
                return None
    return tuple(types)
