"""Whatever is thrown at the loader, it returns a configuration or says cleanly what is wrong."""

import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from config.config_samples import sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neox.config import Config, config_from_dict, deepspeed_dict, load_config, show
from neox.config.deepspeed import SECTIONS as MAPPINGS
from neox.config.schema import fields_with_keys, known_keys, other_keys
from neox.errors import ConfigError

ROOT = Path(__file__).parents[2]
KEYS = sorted(known_keys())
PLACES = {place.key: place for _, place in fields_with_keys()}


def fixed(examples: int) -> settings:
    """The same examples in every run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )


def judged(load: Callable[[], Config]) -> Config | None:
    """The configuration, or None after a clean error."""
    try:
        config = load()
        if config.batch.train_batch_size:
            deepspeed_dict(config)
        show.table(show.rows(config))
        show.as_json(show.rows(config, only_given=True))
        show.as_yaml(config)
    except ConfigError as error:
        lines = str(error).splitlines()
        assert lines
        assert all(line.strip() and ":" in line for line in lines), lines
        assert len(set(lines)) == len(lines)
        return None
    return config


texts = st.text(max_size=8) | st.sampled_from(
    ["auto", "1e-8", "1.0e_8", "nan", "inf", "a\nb", "cpu", "all", "gelu", "-1"]
)
numbers = (
    st.integers(-3, 9)
    | st.sampled_from([64, 1e5, 10**30, -(10**30), 1e400, float("nan"), 0.5, 1e-8, 2048])
    | st.floats(allow_nan=True, allow_infinity=True)
)
leaves = st.none() | st.booleans() | numbers | texts
inner_names = st.sampled_from(sorted({name for names in MAPPINGS.values() for name in names} | {
    "type", "params", "lr", "betas", "eps", "rope_type", "factor", "rank", "targets", "min_difficulty",
    "schedule_config",
    "original_max_position_embeddings", "total_curriculum_step", "difficulty_step", "enabled", "momentum",
}))  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(inner_names | texts, inner, max_size=4),
    max_leaves=6,
)


def plausible(key: str) -> st.SearchStrategy[Any]:
    """Values that look right for a key."""
    place = PLACES.get(key)
    if place is None:
        declared = other_keys().get(key)
        return st.just(declared.default) if declared else values
    choices = [
        choice
        for part in (place.info.annotation, *typing.get_args(place.info.annotation))
        if typing.get_origin(part) is typing.Literal
        for choice in typing.get_args(part)
    ]
    if choices:
        return st.sampled_from(choices)
    words = str(place.info.annotation)
    if "bool" in words:
        return st.booleans()
    if "tuple" in words:
        return st.lists(leaves, max_size=3)
    if "dict" in words:
        known = sorted(MAPPINGS.get(key, {"lr": 1}))
        return st.dictionaries(st.sampled_from(known), leaves, max_size=3)
    if "int" in words or "float" in words:
        return st.sampled_from([0, 1, 2, 3, 4, 8, 0.1, 0.5, 1.0])
    return st.sampled_from(["a", "data/b", "1, 2", "uniform"])


@st.composite
def flats(draw: st.DrawFn) -> dict[str, Any]:
    """A small model with some keys changed."""
    flat = sample()
    for key in draw(st.lists(st.sampled_from(KEYS), max_size=7)):
        flat[key] = draw(plausible(key) if draw(st.booleans()) else values)
    if draw(st.integers(0, 9)) == 0:
        flat[draw(texts)] = draw(values)
    for key in draw(st.lists(st.sampled_from(sorted(flat)), max_size=1)):
        del flat[key]
    return flat


@fixed(200)
@given(flat=flats(), world_size=st.sampled_from([None, 1, 2, 4, 6]))
def test_any_mapping(flat: dict[str, Any], world_size: int | None) -> None:
    config = judged(lambda: config_from_dict(flat, world_size=world_size))
    if config is not None:
        # What is resolved can be resolved again; an empty section is no longer there then.
        again = config_from_dict(config.to_flat(), world_size=world_size)
        assert again.notices == tuple(line for line in config.notices if ": empty," not in line)


@pytest.mark.parametrize("key", KEYS)
def test_any_key_with_wrong_values(key: str) -> None:
    wrong = [
        -1,
        0,
        3,
        2.5,
        True,
        "x",
        "",
        [],
        ["x"],
        [[1]],
        {},
        {"x": 1},
        {"enabled": True},
        {"type": []},
        [{}],
        10**40,
    ]
    for value in wrong:
        judged(lambda value=value: config_from_dict(sample() | {key: value}))  # type: ignore[misc]


@fixed(70)
@given(data=st.data())
def test_any_file(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = json.dumps(data.draw(flats()), indent=data.draw(st.sampled_from([None, 1])))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        text = text[:at] + data.draw(st.text("{}[],:'\"&*!|>%@`#- \n\t\\?~<é\x00a0", max_size=3)) + text[at + cut :]
    path = tmp_path_factory.getbasetemp() / "any.yml"
    path.write_text(text, encoding="utf-8")
    judged(lambda: load_config([path]))


@fixed(120)
@given(content=st.binary(max_size=60) | st.text("{}[],:'\"&*!|>%@`#- \n\t\\?~<a0e.", max_size=40).map(str.encode))
def test_any_bytes(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yml"
    path.write_bytes(content)
    assert judged(lambda: load_config([path])) is None


@fixed(50)
@given(data=st.data())
def test_any_overrides(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    names = st.sampled_from([*KEYS, "optimizer.params.lr", "zero_optimization.stage", "lora.rank"]) | texts
    overrides = data.draw(st.lists(st.builds("{}={}".format, names, leaves), max_size=4))
    folder = tmp_path_factory.getbasetemp()
    (folder / "base.yml").write_text(json.dumps(sample()))
    (folder / "over.yml").write_text(json.dumps(data.draw(flats())))
    judged(lambda: load_config([folder / "base.yml"], overrides=overrides, override_files=[folder / "over.yml"]))
