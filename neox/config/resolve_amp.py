"""Rules of the `amp` section: what apex's mixed precision is today."""

from typing import Any

from neox.config.deepspeed import DeepSpeedConfig
from neox.config.keys import mismatch, number
from neox.config.model import ModelConfig
from neox.config.problems import Problems, did_you_mean

_LEVELS = {"O0": "fp32", "O1": "fp16", "O2": "fp16"}
_KINDS: dict[str, Any] = {
    "enabled": bool,
    "opt_level": str,
    "loss_scale": float | str,
    "min_loss_scale": int,
    "max_loss_scale": float,
    "master_weights": bool,
    "keep_batchnorm_fp32": bool,
    "patch_torch_functions": bool,
    "num_losses": int,
    "verbosity": int,
}
_INFINITE = 1e30
_UNUSED = ("max_loss_scale", "keep_batchnorm_fp32", "patch_torch_functions", "num_losses", "verbosity")
_DYNAMIC = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}
"""Apex's moving loss scale in DeepSpeed's words: from 2**16, doubled after 2000 good steps, halved at each overflow."""


def resolve_amp(
    deepspeed: DeepSpeedConfig, model: ModelConfig, problems: Problems, notices: list[str]
) -> DeepSpeedConfig:
    """Turn the section into `fp16`, and note what contradicts it."""
    section = deepspeed.amp
    if not section or not _check_values(section, problems) or not section["enabled"]:
        return deepspeed
    level = section.get("opt_level", "O1")
    precision = _LEVELS[level]
    if not _agrees(deepspeed, model, level, problems):
        return deepspeed
    unused = [name for name in _UNUSED if name in section]
    if unused:
        verb = "has" if len(unused) == 1 else "have"
        notices.append(f"{', '.join(f'amp.{name}' for name in unused)} {verb} no effect here")
    notices.append(f"amp: apex is gone; opt_level {level} runs as precision {precision}")
    return deepspeed if precision == "fp32" else deepspeed.model_copy(update={"fp16": _fp16(section)})


def _check_values(section: dict[str, Any], problems: Problems) -> bool:
    """Check names and values; say whether nothing is wrong."""
    before = len(problems.lines)
    if "enabled" not in section:
        problems.add("amp.enabled", "not set; add enabled: true or enabled: false")
    for name, value in section.items():
        if name not in _KINDS:
            problems.add(f"amp.{name}", f"unknown key{did_you_mean(str(name), _KINDS) or '; remove it'}")
        elif wrong := _wrong(name, value):
            problems.add(f"amp.{name}", wrong)
    return len(problems.lines) == before


def _wrong(name: str, value: Any) -> str:
    if name == "loss_scale":
        fits = value == "dynamic" or (not mismatch(value, float) and 0 < number(value) < _INFINITE)
        return "" if fits else f"expected 'dynamic' or a number above 0, got {value!r}"
    if name == "opt_level" and value == "O3":
        return "'O3' keeps no fp32 weights, and training needs them; set O2"
    if name == "opt_level":
        return "" if value in list(_LEVELS) else f"expected {' or '.join(map(repr, _LEVELS))}, got {value!r}"
    if name == "master_weights" and value is False:
        return "false keeps no fp32 weights, and training needs them; remove it"
    wrong = mismatch(value, _KINDS[name])
    return wrong or (f"expected at least 0, got {value!r}" if name == "min_loss_scale" and value < 0 else "")


def _agrees(deepspeed: DeepSpeedConfig, model: ModelConfig, level: str, problems: Problems) -> bool:
    """Whether nothing else says what the precision is, or says the same."""
    for name in ("fp16", "bf16"):
        if (getattr(deepspeed, name) or {}).get("enabled"):
            problems.add("amp", f"set together with {name}.enabled; remove one of them")
            return False
    if "precision" in model.model_fields_set and model.precision != _LEVELS[level]:
        problems.add("amp.opt_level", f"{level} contradicts precision {model.precision!r}; remove one of them")
        return False
    return True


def _fp16(section: dict[str, Any]) -> dict[str, Any]:
    scale = section.get("loss_scale", "dynamic")
    result: dict[str, Any] = {"enabled": True, **_DYNAMIC}
    if scale != "dynamic":
        result["loss_scale"] = float(number(scale))
    if "min_loss_scale" in section:
        result["min_loss_scale"] = int(section["min_loss_scale"])
    return result
