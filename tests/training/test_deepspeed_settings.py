"""What DeepSpeed's reader refuses is one line that names section and field, before anything is built."""

from typing import Any

import pytest
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import config_from_dict
from neox.errors import ConfigError
from neox.training import deepspeed_settings
from neox.training.deepspeed_settings import check_settings
from neox.training.preflight import prepare

BASE = MODEL | TRAINING | ADAMW
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"zero_optimization": {"stage": 1, "zenflow": {"topk_ratio": "x"}}},
        "zero_optimization.zenflow.topk_ratio: DeepSpeed refuses it: Input should be a valid number, unable to parse "
        "string as a number, got 'x'",
    ),
    (
        {"deepspeed_extra_args": {"compile": {"deepcompile": "perhaps"}}},
        "deepspeed_extra_args.compile.deepcompile: DeepSpeed refuses it: Input should be a valid boolean",
    ),
    (
        {"deepspeed_extra_args": {"checkpoint": {"tag_validation": "loud", "load_universal": False}}},
        "deepspeed_extra_args.checkpoint.tag_validation: DeepSpeed refuses it: Checkpoint config contains invalid",
    ),
    ({"deepspeed_extra_args": {"aio": 3}}, "deepspeed_extra_args.aio: DeepSpeed refuses it: it has no use for 3"),
]


@pytest.mark.parametrize(("changes", "line"), REFUSED)
def test_refusals_are_one_line(changes: dict[str, Any], line: str) -> None:
    config = config_from_dict(BASE | changes, world_size=4)
    for read in (check_settings, prepare):
        with pytest.raises(ConfigError) as error:
            read(config)
        assert str(error.value).startswith(line)
        assert "\n" not in str(error.value)


def test_each_section_has_its_line() -> None:
    extra = {"aio": 3, "compile": {"deepcompile": "perhaps", "kernels": 1}}
    with pytest.raises(ConfigError) as error:
        check_settings(config_from_dict(BASE | {"deepspeed_extra_args": extra}))
    assert [line.partition(":")[0] for line in str(error.value).splitlines()] == [
        "deepspeed_extra_args.aio",
        "deepspeed_extra_args.compile.deepcompile",
        "deepspeed_extra_args.compile.kernels",
    ]


@pytest.mark.parametrize("world_size", [1, 4])
def test_what_deepspeed_reads_passes(world_size: int) -> None:
    section = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}, "zero_hpz_partition_size": 1}
    check_settings(config_from_dict(BASE | {"zero_optimization": section}, world_size=world_size))


def test_other_errors_are_not_taken_for_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: Any) -> dict[str, Any]:
        raise KeyError("a defect")

    monkeypatch.setattr(deepspeed_settings, "deepspeed_dict", fail)
    with pytest.raises(KeyError, match="a defect"):
        check_settings(config_from_dict(BASE))
