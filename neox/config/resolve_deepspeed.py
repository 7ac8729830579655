"""Rules of DeepSpeed's sections: names, types and bounds inside them, and what goes together."""

from collections.abc import Iterator
from typing import Any, Literal

from neox.config.deepspeed import (
    ABOVE_ZERO,
    ANY_SIGN,
    AT_MOST_ONE,
    EXTRA_KEYS,
    LEFTOVERS,
    MOST,
    OWN_KEYS,
    RETIRED_OFFLOAD,
    SECTIONS,
    DeepSpeedConfig,
)
from neox.config.keys import mismatch, number, unmeant
from neox.config.model import ModelConfig
from neox.config.problems import Problems, did_you_mean

_MUST_SAY_ENABLED = ("fp16", "bf16", "flops_profiler")
_ONE_VALUE: dict[str, tuple[Any, str]] = {
    "gradient_allreduce_op": (
        "mean",
        "a loss here has the share of its rank in it, and a sum would multiply gradients",
    ),
    "managed_gradient_accumulation": (True, "micro-batches are added up by DeepSpeed"),
}
"""Keys with which DeepSpeed would make other updates of the same batch: the value that is right here, and why."""
_SPELLINGS = {"fp16": ("fp16", "float16"), "bf16": ("bf16", "bfloat16")}


def resolve_deepspeed(
    deepspeed: DeepSpeedConfig, model: ModelConfig, problems: Problems, notices: list[str]
) -> DeepSpeedConfig:
    """Check the sections, those of deepspeed_extra_args too, and announce what upstream's files carry for nothing."""
    for name in _MUST_SAY_ENABLED:
        section = getattr(deepspeed, name)
        if section is not None and "enabled" not in section:
            problems.add(f"{name}.enabled", "not set; add enabled: true or enabled: false")
    extra = deepspeed.deepspeed_extra_args or {}
    _check_extra(extra, problems)
    for place, kinds in SECTIONS.items():
        name, _, inner = place.partition(".")
        for path, section in ((place, getattr(deepspeed, name)), (f"deepspeed_extra_args.{place}", extra.get(name))):
            inside = section.get(inner) if inner and isinstance(section, dict) else section
            _check_section(path, inside, kinds, problems)
    deepspeed = _with_old_bf16(deepspeed, model, problems, notices)
    for name, spellings in _SPELLINGS.items():
        _check_leftovers(name, spellings, getattr(deepspeed, name) or {}, problems, notices)
    _check_zero_extensions(deepspeed, problems)
    return deepspeed


def _with_old_bf16(
    deepspeed: DeepSpeedConfig, model: ModelConfig, problems: Problems, notices: list[str]
) -> DeepSpeedConfig:
    """Read `fp16: {enabled: true, type: bfloat16}`, GPT-NeoX's spelling before it had a section bf16, as that."""
    section, bf16 = deepspeed.fp16 or {}, deepspeed.bf16 or {}
    if not section.get("enabled") or section.get("type") not in _SPELLINGS["bf16"]:
        return deepspeed
    against = ""
    if "precision" in model.model_fields_set and model.precision != "bfloat16":
        against = f"precision {model.precision!r}"
    elif bf16.get("enabled") is False:
        against = "bf16.enabled, which is false"
    if against:
        problems.add("fp16.type", f"{section['type']!r} contradicts {against}; remove one of them")
        return deepspeed.model_copy(update={"fp16": None})
    notices.append(
        f"{problems.named('fp16.type')}: runs in bfloat16, as bf16: {{enabled: true}} does; fp16 and its loss scale "
        "have no effect"
    )
    return deepspeed.model_copy(update={"fp16": None, "bf16": {**bf16, "enabled": True}})


def _check_extra(extra: dict[str, Any], problems: Problems) -> None:
    """Refuse what DeepSpeed would not read, or for nothing."""
    for key, value in ((str(key), value) for key, value in extra.items()):
        place = f"deepspeed_extra_args.{key}"
        if key in _ONE_VALUE and value != _ONE_VALUE[key][0]:
            problems.add(place, f"{value!r} trains wrongly: {_ONE_VALUE[key][1]}; remove it")
        elif key in OWN_KEYS:
            problems.add(place, f"is a key of its own; set {key} beside deepspeed_extra_args")
        elif key == "ssh_port":
            problems.add(place, "is no setting of the engine; give the hosts their Port in ~/.ssh/config")
        elif key not in EXTRA_KEYS:
            problems.add(place, f"DeepSpeed knows no such key{did_you_mean(key, EXTRA_KEYS) or '; remove it'}")


def settle_types(deepspeed: DeepSpeedConfig, model: ModelConfig) -> DeepSpeedConfig:
    """Fill in the types that gradients are summed and reduced in, where DeepSpeed's own choice is not ours."""
    in_bf16 = model.precision == "bfloat16"
    communication, types = deepspeed.communication_data_type, deepspeed.data_types
    if in_bf16:
        # Eight bits of mantissa lose small gradients when many micro-batches or ranks are summed.
        types = {"grad_accum_dtype": "fp32"} | (types or {})
    if in_bf16 or deepspeed.fp32_allreduce:
        communication = communication or "fp32"
    return deepspeed.model_copy(update={"communication_data_type": communication, "data_types": types})


def _check_section(place: str, section: Any, kinds: dict[str, Any], problems: Problems) -> None:
    if not isinstance(section, dict):
        return  # absent, or a wrong type that the section around it tells
    for key, value in section.items():
        if key not in kinds:
            problems.add(f"{place}.{key}", f"unknown key{did_you_mean(str(key), sorted(kinds)) or '; remove it'}")
        elif kinds[key] is not Any and value is not None:
            wrong = mismatch(value, kinds[key]) or _out_of_bounds(key, value, kinds[key])
            wrong = wrong or (unmeant(value) if kinds[key] is str else "")
            if wrong:
                problems.add(f"{place}.{key}", wrong)


def _out_of_bounds(key: str, value: Any, kind: Any) -> str:
    if kind not in (int, float) or key in ANY_SIGN:
        return ""
    amount = number(value)
    if key in ABOVE_ZERO and not amount > 0:
        return f"expected more than 0, got {value!r}"
    if key in MOST and not amount <= MOST[key]:
        return f"expected at most {MOST[key]}, got {value!r}"
    if key in AT_MOST_ONE and not 0 <= amount <= 1:
        return f"expected 0 to 1, got {value!r}"
    return "" if amount >= 0 else f"expected at least 0, got {value!r}"


def _check_leftovers(
    name: str, spellings: tuple[str, ...], section: dict[str, Any], problems: Problems, notices: list[str]
) -> None:
    """Announce keys that DeepSpeed itself would refuse and upstream's files have all the same."""
    if section.get("enabled") and section.get("type", name) not in spellings:
        problems.add(
            f"{name}.type",
            f"{section['type']!r} contradicts {name}, which is what runs; remove it or change the section",
        )
    for key in (key for key in section if key in LEFTOVERS[name]):
        why = f"{name}.enabled is what counts" if key in (name, "type") else f"{name} has no loss scale"
        notices.append(f"{problems.named(f'{name}.{key}')} has no effect: {why}")


def _check_zero_extensions(deepspeed: DeepSpeedConfig, problems: Problems) -> None:
    """Check what DeepSpeed has at some ZeRO stages only."""
    zero = deepspeed.zero_optimization or {}
    stage = zero.get("stage", 0)
    for key, least in _least_stages(zero):
        if isinstance(stage, int) and stage < least:
            stages = "stage 3" if least == 3 else "stage 1, 2 or 3"
            problems.add(f"zero_optimization.{key}", f"needs {stages}, got {stage!r}; set stage: {least}, or remove it")
    for key in ("offload_optimizer", "offload_param"):
        section, retired = zero.get(key), RETIRED_OFFLOAD[key]
        if isinstance(section, dict) and not offloads(section) and offloads(zero.get(retired)):
            problems.add(
                f"zero_optimization.{retired}", f"contradicts {key}, which offloads nothing; remove one of them"
            )
        if not isinstance(section, dict) or section.get("device") != "nvme":
            continue
        place = f"zero_optimization.{key}"
        if key == "offload_optimizer" and stage in (1, 2):
            problems.add(f"{place}.device", f"'nvme' needs stage 3, got {stage}; set device: cpu, or stage: 3")
        elif not section.get("nvme_path"):
            problems.add(f"{place}.nvme_path", "not set, and device is nvme; add nvme_path: a folder on the drive")


def _least_stages(zero: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Keys that ask for something, each with the least ZeRO stage that has it."""
    for key, least in (("offload_param", 3), ("cpu_offload_param", 3), ("offload_optimizer", 1), ("cpu_offload", 1)):
        if offloads(zero.get(key)):
            yield key, least
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key):
            yield key, 3
    if zero.get("zero_hpz_partition_size", 1) != 1:
        yield "zero_hpz_partition_size", 3


def offloads(section: Any) -> bool:
    """Whether a value of offload_optimizer, offload_param, or of their retired spellings, asks for anything."""
    return section.get("device", "none") != "none" if isinstance(section, dict) else section is True


def offload_device(deepspeed: DeepSpeedConfig, what: Literal["optimizer", "param"]) -> str:
    """Where DeepSpeed keeps the optimizer's state or the parameters: cpu, nvme, or none for the device itself."""
    for zero in (deepspeed.zero_optimization, (deepspeed.deepspeed_extra_args or {}).get("zero_optimization")):
        if not isinstance(zero, dict):
            continue
        section = zero.get(f"offload_{what}")
        if offloads(section):
            return str(section["device"]) if isinstance(section, dict) else "cpu"
        if offloads(zero.get(RETIRED_OFFLOAD[f"offload_{what}"])):
            return "cpu"
    return "none"
