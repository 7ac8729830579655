"""What is known of every key."""

from pathlib import Path

import pytest
from config.config_samples import sample

from neox.config import config_from_dict
from neox.config.keys import Status
from neox.config.schema import fields_with_keys, known_keys, other_keys
from neox.errors import ConfigError

UPSTREAM = (Path(__file__).parents[1] / "data" / "upstream_keys.txt").read_text().split()


def test_every_upstream_key_is_known() -> None:
    assert len(UPSTREAM) == 321
    assert set(UPSTREAM) <= known_keys()
    assert known_keys() - set(UPSTREAM) == {"compile"}


def test_keys_are_declared_once_and_described() -> None:
    keys = [place.key for _, place in fields_with_keys()] + list(other_keys())
    assert len(keys) == len(set(keys))
    described = [place.info.description for _, place in fields_with_keys()]
    described += [key.description for key in other_keys().values()]
    assert all(text and text.endswith(".") for text in described)


@pytest.mark.parametrize("name", [key.name for key in other_keys().values() if key.status is Status.NOT_YET])
def test_unsupported_key_is_refused_by_name_unless_inactive(name: str) -> None:
    key = other_keys()[name]
    assert config_from_dict(sample(**{name: key.default})).notices == ()
    value = {"enabled": True} if key.kind is dict else "something else"
    with pytest.raises(ConfigError) as error:
        config_from_dict(sample(**{name: value}))
    assert str(error.value).startswith(f"{name}: {value!r} is not supported yet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [key.name for key in other_keys().values() if key.status is Status.DEAD])
def test_dead_key_is_announced_once(name: str) -> None:
    value = {int: 3, float: 0.5, bool: True, str: "x"}.get(other_keys()[name].kind, 3)
    (notice,) = config_from_dict(sample(**{name: value})).notices
    assert notice == f"{name} has no effect: it is not used"


@pytest.mark.parametrize("name", [key.name for key in other_keys().values() if key.status is Status.INTERNAL])
def test_internal_key_says_what_to_set(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(sample(**{name: 1}))
    assert str(error.value) == f"{name}: cannot be set; {other_keys()[name].instead}"


@pytest.mark.parametrize("name", [key.name for key in other_keys().values() if key.status is Status.NO_EFFECT])
def test_key_without_effect_is_accepted_and_typed(name: str) -> None:
    key = other_keys()[name]
    value = {bool: True, str: "folder"}.get(key.kind, key.default)
    notices = config_from_dict(sample(**{name: value})).notices
    assert len(notices) == key.announce
    assert all(name in notice for notice in notices)
    with pytest.raises(ConfigError, match=f"^{name}: expected"):
        config_from_dict(sample(**{name: 3}))


def test_memory_switches_of_upstream_files_are_announced_only_when_on() -> None:
    assert config_from_dict(sample(partition_activations=False, synchronize_each_layer=False)).notices == ()
    assert len(config_from_dict(sample(partition_activations=True, synchronize_each_layer=True)).notices) == 2


def test_inactive_values_of_unsupported_keys() -> None:
    flat = sample(num_kv_heads=4, curriculum_learning={"enabled": False}, sparsity_config={}, use_comet=False)
    assert config_from_dict(flat).notices == ()
    with pytest.raises(ConfigError, match="num_kv_heads: 2 is not supported yet"):
        config_from_dict(sample(num_kv_heads=2))
    with pytest.raises(ConfigError, match="mamba_selective_fp32_params: False is not supported yet"):
        config_from_dict(sample(mamba_selective_fp32_params=False))


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("norm", "rmsnorm", "'layernorm'"),
        ("pos_emb", "alibi", "'learned', 'rotary' or 'none'"),
        ("activation", "swiglu", "'gelu'"),
        ("init_method", "xavier_normal", "'normal', 'scaled_normal', 'small_init' or 'wang_init'"),
        ("text_gen_type", "precompute", "'unconditional', 'input-file' or 'interactive'"),
    ],
)
def test_partly_supported_choices_name_the_supported(key: str, value: str, supported: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(sample(**{key: value}))
    assert str(error.value) == f"{key}: {value!r} is not supported yet; supported: {supported}"
    with pytest.raises(ConfigError, match=f"^{key}: 'fish' is unknown; supported: "):
        config_from_dict(sample(**{key: "fish"}))


def test_unsupported_optimizer() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer.type: 'lion' is not supported yet; supported: 'adam'"):
        config_from_dict(sample(optimizer={"type": "Lion", "params": {"lr": 1e-3}}))


def test_null_is_the_same_as_absent() -> None:
    flat = sample() | {"save": None, "optimizer_type": None, "num_kv_heads": None, "nonsense": 1}
    with pytest.raises(ConfigError, match=r"^nonsense: unknown key"):
        config_from_dict(flat)
    del flat["nonsense"]
    assert config_from_dict(flat).checkpoint.save is None
