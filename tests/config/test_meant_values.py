"""Values that pass the type check and mean something else: text for no value, numbers beyond what takes them."""

from types import UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np
import pytest
from config.config_samples import sample

from neox.config import config_from_dict
from neox.config.keys import Text
from neox.config.schema import Place, fields_with_keys
from neox.errors import ConfigError

FREE = {"split", "prompt_end", "eval_results_prefix", "pipe_partition_method"}
"""Keys of text with rules of their own."""


def kinds(place: Place) -> tuple[Any, ...]:
    annotation = place.info.annotation
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def text_keys() -> list[str]:
    return [place.key for _, place in fields_with_keys() if str in kinds(place) or Text in kinds(place)]


def list_keys() -> list[str]:
    return [place.key for _, place in fields_with_keys() if place.key.endswith(("_data_paths", "eval_tasks"))]


def message(**changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        config_from_dict(sample(**changes), world_size=1)
    return str(error.value)


def test_there_are_keys_of_text() -> None:
    assert {"save", "load", "hostfile", "vocab_file", "wandb_group", "data_path", "log_dir"} <= set(text_keys())
    assert len(list_keys()) > 12


@pytest.mark.parametrize("key", sorted(set(text_keys()) - FREE))
def test_text_that_means_no_value_makes_no_folder(key: str) -> None:
    for word in ("None", "none", "null", "~", "", " ", "True", "false"):
        said = message(**{key: word})
        assert f"{key}: expected text, got {word!r}" in said
        assert ("write null for no value" in said) == (word not in ("True", "false"))


@pytest.mark.parametrize("key", list_keys())
def test_nor_does_it_inside_a_list(key: str) -> None:
    assert f"{key}: expected text, got 'None'" in message(**{key: ["None"]})


def test_folders_that_only_a_shell_would_find() -> None:
    assert message(save="~/runs").startswith("save: '~/runs' begins with ~")
    assert message(load="a\0b").startswith("load: 'a\\x00b' has a NUL character")


@pytest.mark.parametrize("key", ["flops_profiler.output_file", "csv_monitor.output_path", "tensorboard.job_name"])
def test_texts_of_deepspeeds_sections(key: str) -> None:
    section, _, name = key.partition(".")
    assert message(**{section: {"enabled": True, name: "None"}}).startswith(f"{key}: expected text, got 'None'")


def test_an_unknown_key_is_refused_whatever_its_value() -> None:
    assert message(unheard_of=0).startswith("unheard_of: unknown key")
    flat = sample() | {"unheard_of": None}
    with pytest.raises(ConfigError, match="unheard_of: unknown key"):
        config_from_dict(flat)


def test_every_seed_that_is_accepted_is_one_for_numpy() -> None:
    for seed in (1, 2**32 - 1):
        np.random.RandomState(config_from_dict(sample(seed=seed)).training.seed)
    for seed in (-1, 2**32, 2**64):
        assert message(seed=seed).startswith("seed: expected ")
    assert message(seed=2**32) == "seed: expected less than 4294967296, got 4294967296"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train_iters": 2**63}, "train_iters: expected less than 2**63"),
        ({"hidden_size": 1e30}, "hidden_size: expected less than 2**63"),
        ({"master_port": 65536}, "master_port: expected less than 65536"),
        ({"s3_chunk_size": 2**33}, "s3_chunk_size: expected at most 5368709120"),
        (
            {"fp16": {"enabled": True, "initial_scale_power": 128}},
            "fp16.initial_scale_power: expected at most 127",
        ),
    ],
)
def test_numbers_beyond_what_takes_them(changes: dict[str, Any], line: str) -> None:
    assert message(**changes).startswith(line)
