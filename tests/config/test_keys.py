"""What is known of every key."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from config.config_samples import sample

from neox.config import Config, config_from_dict, load_config
from neox.config.keys import Status
from neox.config.schema import fields_with_keys, known_keys, other_keys
from neox.errors import ConfigError

ROOT = Path(__file__).parents[2]
TABLE = [line.split("\t") for line in (ROOT / "tests/data/upstream_keys.tsv").read_text().splitlines()]
UPSTREAM = {name: kind for name, kind, _ in TABLE}
"""The type of every key that GPT-NeoX declares."""
DEFAULTS = {name: ast.literal_eval(default) for name, _, default in TABLE if default != "None"}
FIELDS = {place.key: (section, place) for section, place in fields_with_keys()}
OURS = {
    "async_save",
    "auto_resume",
    "compile",
    "determinism",
    "distributed_timeout",
    "document_masking",
    "elastic",
    "embedding_norm",
    "gradient_norm_limit",
    "io_retry_time",
    "load_fallback",
    "log_file_count",
    "log_file_size",
    "lora",
    "loss_spike_deviations",
    "loss_spike_window",
    "max_restarts",
    "max_skips",
    "moe_aux_loss_coeff",
    "moe_normalize_weights",
    "moe_z_loss_coeff",
    "on_bad_loss",
    "on_large_gradient",
    "on_loss_spike",
    "on_replica_mismatch",
    "preflight",
    "rampup_batch_size",
    "reference_load",
    "replica_check_interval",
    "requeue_status",
    "rewind_window",
    "rope_scaling",
    "save_hf",
    "stop_file",
    "straggler_factor",
    "time_limit",
    "wsd_decay_fraction",
    "wsd_decay_shape",
}
OF_TYPE = {"bool": [True, False], "int": [1, 12], "float": [0.5, 1], "str": ["text"], "list": [["a"]], "dict": [{}]}


def upstream_values(name: str) -> list[Any]:
    """Values that GPT-NeoX's type of a key allows."""
    kind = UPSTREAM[name]
    if kind.startswith("Literal"):
        return list(ast.literal_eval(kind.removeprefix("Literal")))
    return [value for word in re.findall(r"\w+", kind) for value in OF_TYPE.get(word, [])]


def attempt(name: str, value: Any) -> tuple[Config | None, str]:
    """The configuration with one key set, or what is said against the key."""
    flat = sample()
    flat = flat | {name: value} if name in ("optimizer", *UPSTREAM) else flat
    try:
        return config_from_dict(flat), ""
    except ConfigError as error:
        lines = str(error).splitlines()
        return None, next((line for line in lines if line.startswith((f"{name}:", f"{name}."))), "")


def test_every_upstream_key_is_known_and_ours_are_told() -> None:
    assert len(UPSTREAM) == 321
    assert known_keys() - UPSTREAM.keys() == OURS
    assert UPSTREAM.keys() <= known_keys()
    page = (ROOT / "docs/configuration.md").read_text()
    told = page.partition("Keys that GPT-NeoX lacks: ")[2].partition(";")[0]
    assert set(re.findall(r"`(\w+)`", told)) == OURS


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_value_of_upstreams_type_is_accepted_or_refused_by_name(name: str) -> None:
    """No key is ignored: a value is kept and used, named in one notice, or refused in one line."""
    key = other_keys().get(name)
    for value in upstream_values(name):
        config, refusal = attempt(name, value)
        if key is not None and key.status is Status.INTERNAL:
            assert refusal == f"{name}: cannot be set; {key.instead}"
            continue
        if (name, value) == ("deepspeed", False):
            continue
        # A type that upstream allows is not what is wrong with it.
        assert "expected" not in refusal or UPSTREAM[name] in (
            "str",
            "dict",
            "list",
            "int",
            "float",
            "Union[int, float]",
        )
        if key is None or config is None:
            continue
        assert config.given[name] == value
        named = [notice for notice in config.notices if re.search(rf"\b{name}\b", notice)]
        expected = key.status is Status.DEAD or (key.status is Status.NO_EFFECT and not key.is_inactive(value, {}))
        assert len(named) == expected
        if key.status is Status.NOT_YET:
            assert key.is_inactive(value, config.given)


@pytest.mark.parametrize("name", DEFAULTS)
def test_upstreams_default_is_accepted_and_not_dropped(name: str) -> None:
    if name in other_keys() and other_keys()[name].status is Status.INTERNAL:
        return
    config, refusal = attempt(name, DEFAULTS[name])
    assert config is not None, refusal
    assert config.given[name] == DEFAULTS[name]
    assert config.sources[name] == "given"
    if name in FIELDS:
        section, place = FIELDS[name]
        value = getattr(getattr(config, section), place.field)
        assert place.field in getattr(config, section).model_fields_set
        assert value == DEFAULTS[name] or name in ("train_batch_size", "activation")


def test_declared_types_are_upstreams() -> None:
    """Apart from those that upstream gets wrong."""
    wrong_upstream = {"communication_data_type", "rotary_emb_base"}
    for name, kind in UPSTREAM.items():
        key = other_keys().get(name)
        if key is None or key.status is Status.INTERNAL or name in wrong_upstream:
            continue
        words = set(re.findall(r"bool|int|float|str|list|dict|List", kind.replace("Literal", "str").partition("[")[0]))
        declared = str(key.kind)
        assert "Literal" in declared or any(word in declared for word in words) or "Union" in kind or "Optional" in kind


def test_keys_are_declared_once_and_described() -> None:
    keys = [place.key for _, place in fields_with_keys()] + list(other_keys())
    assert len(keys) == len(set(keys))
    texts = {place.key: place.info.description for _, place in fields_with_keys()}
    texts |= {key.name: key.description for key in other_keys().values()}
    rules = {place.key: place.rule for _, place in fields_with_keys() if place.rule}
    rules |= {key.name: key.rule for key in other_keys().values() if key.rule}
    assert not [name for name, text in (texts | rules).items() if not text or not text.endswith(".")]
    assert not [name for name in texts if not texts[name]]


NOT_YET = [key.name for key in other_keys().values() if key.status is Status.NOT_YET]


@pytest.mark.parametrize("name", NOT_YET)
def test_unsupported_key_is_refused_by_name_unless_inactive(name: str) -> None:
    key = other_keys()[name]
    assert config_from_dict(sample(**{name: key.default})).notices == ()
    value = {"enabled": True} if key.kind is dict else "something else"
    with pytest.raises(ConfigError) as error:
        config_from_dict(sample(**{name: value}))
    assert str(error.value).startswith(f"{name}: {value!r} is not supported yet")
    assert "\n" not in str(error.value)


def test_the_exotic_families_are_what_is_not_supported() -> None:
    families = (
        r"mamba_|use_mup|mup_|coord_check|save_base_shapes|base_shapes_file|rpe_|spars|gmlp|soft_prompt|dim_att",
        r"head_size|ffn_dim",
        r"te_|autotuning",
    )
    pattern = re.compile("|".join(families))
    assert not [name for name in NOT_YET if not pattern.search(name)]


def test_inactive_values_of_unsupported_keys() -> None:
    flat = sample(autotuning={"enabled": False}, sparsity_config={}, soft_prompt_tuning=False)
    assert config_from_dict(flat).notices == ()
    with pytest.raises(ConfigError, match="mamba_selective_fp32_params: False is not supported yet"):
        config_from_dict(sample(mamba_selective_fp32_params=False))


def test_places_of_notices(tmp_path: Path) -> None:
    path = tmp_path / "a.yml"
    lines = [f"{key}: {value!r}" for key, value in sample().items()]
    path.write_text("\n".join(["rope-fusion: true", "hysteresis: 2", *lines]))
    assert load_config([path]).notices == (
        f"{path}:1: rope_fusion has no effect here: results are the same without it",
        f"{path}:2: hysteresis has no effect: it is not used",
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pos_emb", "rpe", "'rpe' is not supported yet; supported: 'learned', "),
        ("pos_emb", "fish", "'fish' is unknown; supported: 'learned', "),
        ("attention_config", [[["mamba"], 4]], "'mamba' is not supported yet"),
    ],
)
def test_partly_supported_choices_name_the_supported(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(sample(**{key: value}))
    assert str(error.value).startswith(f"{key}: {message}")


def test_null_is_the_same_as_absent() -> None:
    flat = sample() | {"save": None, "optimizer_type": None, "num_kv_heads": None, "nonsense": 1}
    with pytest.raises(ConfigError, match=r"^nonsense: unknown key"):
        config_from_dict(flat)
    del flat["nonsense"]
    assert config_from_dict(flat).checkpoint.save is None
