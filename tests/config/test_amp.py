"""The `amp` section: what apex's levels are today, and what contradicts them."""

from typing import Any

import pytest
from config.config_samples import sample

from neox.config import config_from_dict, deepspeed_dict
from neox.errors import ConfigError

DYNAMIC = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}


@pytest.mark.parametrize(
    ("section", "fp16"),
    [
        ({}, DYNAMIC),
        ({"opt_level": "O1", "loss_scale": "dynamic"}, DYNAMIC),
        (
            {"opt_level": "O2", "loss_scale": "128.0", "min_loss_scale": 2},
            DYNAMIC | {"loss_scale": 128.0, "min_loss_scale": 2},
        ),
        ({"opt_level": "O0"}, {"enabled": False}),
    ],
)
def test_levels(section: dict[str, Any], fp16: dict[str, Any]) -> None:
    config = config_from_dict(sample(amp={"enabled": True, **section}))
    precision, level = "fp16" if fp16["enabled"] else "fp32", section.get("opt_level", "O1")
    assert config.model.precision == precision
    assert deepspeed_dict(config)["fp16"] == fp16
    assert "amp" not in deepspeed_dict(config)
    assert f"amp: apex is gone; opt_level {level} runs as precision {precision}" in config.notices
    again = config_from_dict(config.to_flat(resolved=True))
    assert again.model.precision == precision
    assert deepspeed_dict(again)["fp16"] == fp16


def test_off_is_off() -> None:
    config = config_from_dict(sample(amp={"enabled": False, "opt_level": "O2"}, precision="bfloat16"))
    assert config.model.precision == "bfloat16"
    assert not [line for line in config.notices if "amp" in line]


def test_the_same_precision_may_be_said_twice() -> None:
    assert config_from_dict(sample(amp={"enabled": True}, precision="fp16")).model.precision == "fp16"


def test_what_has_no_effect_is_named() -> None:
    config = config_from_dict(sample(amp={"enabled": True, "verbosity": 1, "keep_batchnorm_fp32": True}))
    assert "amp.keep_batchnorm_fp32, amp.verbosity have no effect here" in config.notices


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"amp": {"opt_level": "O1"}}, "amp.enabled: not set; add enabled: true or enabled: false"),
        ({"amp": {"enabled": True, "opt_levels": "O1"}}, "amp.opt_levels: unknown key; did you mean 'opt_level'?"),
        (
            {"amp": {"enabled": True, "opt_level": "O3"}},
            "amp.opt_level: 'O3' keeps no fp32 weights, and training needs",
        ),
        ({"amp": {"enabled": True, "opt_level": 1}}, "amp.opt_level: expected 'O0' or 'O1' or 'O2', got 1"),
        (
            {"amp": {"enabled": True, "loss_scale": -1}},
            "amp.loss_scale: expected 'dynamic' or a number above 0, got -1",
        ),
        ({"amp": {"enabled": True, "master_weights": False}}, "amp.master_weights: false keeps no fp32 weights"),
        ({"amp": {"enabled": True}, "precision": "bf16"}, "amp.opt_level: O1 contradicts precision 'bfloat16'; remove"),
        ({"amp": {"enabled": True}, "fp16": {"enabled": True}}, "amp: set together with fp16.enabled; remove one"),
        ({"amp": {"enabled": True}, "bf16": {"enabled": True}}, "amp: set together with bf16.enabled; remove one"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(sample(**changes))
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_unused_sections_of_deepspeed_are_announced_and_not_handed_on() -> None:
    config = config_from_dict(
        sample(data_efficiency={"enabled": True}, compression_training={"weight_quantization": {}})
    )
    assert [line for line in config.notices if "no effect" in line] == [
        "data_efficiency has no effect: it is not used",
        "compression_training has no effect: it is not used",
    ]
    assert not {"data_efficiency", "compression_training"} & set(deepspeed_dict(config))
