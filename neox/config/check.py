"""Checks of single keys: is it known, may it be set, has its value the right type."""

import re
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from neox.config.keys import Key, Section, Status, exact, mismatch, number_hint
from neox.config.problems import Problems, did_you_mean
from neox.config.schema import SECTIONS, Place, fields_with_keys, known_keys, other_keys, places

_OFTEN_MEANT = {
    "save_interval": "checkpoint_factor",
    "warmup_iters": "warmup",
    "decay_lr_to": "min_lr",
    "attention_type": "attention_config",
    # as other frameworks spell them
    "vocab_size": "padded_vocab_size",
    "block_size": "seq_length",
    "n_layer": "num_layers",
    "num_hidden_layers": "num_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "num_key_value_heads": "num_kv_heads",
    "hidden_act": "activation",
    "rope_theta": "rotary_emb_base",
    "rms_norm_eps": "rms_norm_epsilon",
    "sliding_window": "sliding_window_width",
    "tie_word_embeddings": "no_weight_tying",
    "learning_rate": "optimizer.params.lr",
    "max_steps": "train_iters",
    "use_rmsnorm": "norm",
    "autotuning_config": "autotuning",
    "gas": "gradient_accumulation_steps",
}

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "finite_number": "a finite number",
}
_MAY_BE_EMPTY = {"zero_optimization.offload_optimizer", "zero_optimization.offload_param"}
"""Sections inside others that DeepSpeed takes to ask for nothing when they are empty; its zenflow is none of them."""

_NUMERIC = ("int_type", "int_from_float", "float_type")
_BOUND = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def drop_unset(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out keys set to null, inside mappings too: that is the same as not setting them."""
    return {
        key: drop_unset(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def check_names(values: dict[str, Any], problems: Problems) -> None:
    """Refuse unknown keys, whatever their value: null may be one that nobody will ever read either."""
    for name in values:
        if name not in known_keys():
            problems.add(name, f"unknown key{_suggestion(name)}")


def drop_empty(values: dict[str, Any], problems: Problems) -> list[str]:
    """Leave out empty sections, which ask for nothing, in DeepSpeed too; return a notice for each.

    Those of keys that no section reads count as inactive by themselves.
    """
    notices = []
    for path in _MAY_BE_EMPTY | _mappings():
        *above, last = path.split(".")
        within = _dig(values, above[0]) if above else values
        if isinstance(within, dict) and within.get(last) == {}:
            del within[last]
            notices.append(f"{problems.named(path)}: empty, the same as absent")
    return sorted(notices)


def _mappings() -> set[str]:
    """Top-level keys whose value is a mapping."""
    found = {place.key.partition(".")[0] for _, place in fields_with_keys() if "." in place.key}
    return found | {
        place.key for _, place in fields_with_keys() if any(get_origin(kind) is dict for kind in _kinds(place))
    }


def _kinds(place: Place) -> tuple[Any, ...]:
    return get_args(place.info.annotation) or (place.info.annotation,)


def check_other_keys(values: dict[str, Any], problems: Problems) -> list[str]:
    """Check the keys that no section reads; return the notices they cause."""
    notices = []
    for name, value in values.items():
        if name in other_keys():
            notices.extend(_check_other(other_keys()[name], value, values, problems))
    # That the key they mean is missing is no second mistake.
    problems.wrong |= {meant for name, meant in _OFTEN_MEANT.items() if name in values and meant not in values}
    return notices


def _suggestion(name: str) -> str:
    if name == "mlp_type":
        return "; remove it, and for mlp_type: llama set activation: swiglu"
    if name in _OFTEN_MEANT:
        return f"; did you mean {_OFTEN_MEANT[name]!r}?"
    return did_you_mean(name, sorted(known_keys())) or "; remove it"


def _check_other(key: Key, value: Any, values: dict[str, Any], problems: Problems) -> list[str]:
    if key.status is Status.INTERNAL:
        problems.add(key.name, f"cannot be set; {key.instead}")
        return []
    inactive = key.is_inactive(value, values)
    if key.status is Status.NOT_YET:
        if not inactive:
            default = "null" if key.default is None else repr(key.default)
            what = key.description.rstrip(".")
            problems.add(key.name, f"{value!r} is not supported yet ({what}); remove the key or set it to {default}")
        return []
    wrong = mismatch(value, key.kind)
    if wrong:
        problems.add(key.name, wrong)
    where = problems.named(key.name)
    if key.status is Status.DEAD:
        return [f"{where} has no effect: it is not used"]
    return [] if inactive else [f"{where} has no effect here: results are the same without it"]


def read_sections(values: dict[str, Any], problems: Problems) -> dict[str, Section]:
    """Read every section with its types; a mistake is noted, and leaves its field without a value."""
    _check_nesting(values, problems)
    sections: dict[str, Section] = {}
    wrong: set[str] = set()
    for name, section in SECTIONS.items():
        known = {place.field: place for place in places(name)}
        found = {field: _dig(values, place.key) for field, place in known.items()}
        given = {field: value for field, value in found.items() if value is not None}
        try:
            sections[name] = section.model_validate(given)
        except ValidationError as error:
            details = error.errors(include_url=False, include_context=True)
            for detail in details:
                place = known[str(detail["loc"][0])]
                problems.add(place.key, _explain(dict(detail), place, found[place.field]))
                wrong.add(place.key)
            sections[name] = _without(section, given, {str(detail["loc"][0]) for detail in details})
    problems.wrong |= wrong
    return sections


def _without(section: type[Section], given: dict[str, Any], wrong: set[str]) -> Section:
    """Make a section whose `wrong` fields are absent: reading one raises AttributeError.

    A wrong choice or switch has its default instead, from which little follows.
    """
    stand_ins = {field: 1 for field in wrong if section.model_fields[field].is_required()}
    partial = section.model_validate({k: v for k, v in given.items() if k not in wrong} | stand_ins)
    for field in wrong:
        if not isinstance(section.model_fields[field].default, str | bool):
            del partial.__dict__[field]
    return partial


def hollow(section: type[Section]) -> Section:
    """Make a section without any field: reading one raises AttributeError."""
    empty = section.model_construct()
    empty.__dict__.clear()
    return empty


def _check_nesting(values: dict[str, Any], problems: Problems) -> None:
    """Check the keys that are mappings of fields, such as optimizer: {type, params}."""
    nested: dict[str, set[str]] = {}
    for _, place in fields_with_keys():
        top, dot, inner = place.key.partition(".")
        if dot:
            nested.setdefault(top, set()).add(inner)
    for top, known in nested.items():
        value = values.get(top, {})
        if not isinstance(value, dict):
            *others, last = sorted(known, reverse=True)
            problems.add(top, f"expected a mapping with {', '.join(others)} and {last}, got {value!r}")
            continue
        for inner in value:
            if inner not in known:
                mend = did_you_mean(str(inner), sorted(known)) or "; remove it or move it into params"
                problems.add(f"{top}.{inner}", f"unknown key{mend}")


def _dig(values: dict[str, Any], key: str) -> Any:
    value: Any = values
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _explain(detail: dict[str, Any], place: Place, whole: Any) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "missing":
        return "required but not set; add it to a configuration file"
    if kind in _BOUND:
        name, words = _BOUND[kind]
        return f"expected {words} {exact(context[name])}, got {value!r}"
    if kind == "unmeant":
        return str(context["wrong"])
    if kind == "literal_error":
        retired = place.extra["retired"].get(str(value).lower())
        if retired:
            return f"{value!r} {retired}"
        known = str(value).lower() in place.extra["upstream"]
        choices = re.findall(r"'([^']*)'", context["expected"])
        what = "not supported yet" if known else f"unknown{did_you_mean(str(value), choices)}"
        return f"{value!r} is {what}; supported: {context['expected']}"
    expected = _EXPECTED.get(kind) or detail["msg"].removeprefix("Input should be ")
    hint = number_hint(value) if kind in _NUMERIC else ""
    inside = f" in {whole!r}" if whole is not value and isinstance(whole, list | tuple) else ""
    return f"expected {expected}, got {value!r}{inside}{hint}"
