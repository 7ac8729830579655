"""The configuration that DeepSpeed gets."""

from copy import deepcopy
from typing import Any

from neox.config.config import Config
from neox.config.deepspeed import LEFTOVERS, RETIRED_OFFLOAD
from neox.config.problems import Problems
from neox.config.resolve_deepspeed import offloads
from neox.errors import ConfigError

_PASSED_ON = ("flops_profiler", "tensorboard", "wandb", "csv_monitor")
_PASSED_ON_WHEN_SET = ("prescale_gradients", "gradient_predivide_factor", "dump_state")


def deepspeed_dict(config: Config) -> dict[str, Any]:
    """Return what `deepspeed.initialize` gets.

    Values are written out even where they equal a default: DeepSpeed's defaults are not upstream's, e.g. its
    gradient clipping is 1.0 when nothing is said.

    Raises:
        ConfigError: the batch is not resolved, or deepspeed_extra_args contradicts another key.
    """
    batch = config.batch
    if not batch.train_batch_size:
        raise ConfigError("train_batch_size: not known before the number of processes is; call with_world_size first")
    result: dict[str, Any] = {
        "train_batch_size": batch.train_batch_size,
        "train_micro_batch_size_per_gpu": batch.train_micro_batch_size_per_gpu,
        "gradient_accumulation_steps": batch.gradient_accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "steps_per_print": config.logging.steps_per_print,
        "wall_clock_breakdown": config.logging.wall_clock_breakdown,
        # DeepSpeed's own meter waits for the device twice in every micro-batch.
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": _zero(config),
        # Our own torch optimizer is passed in, so DeepSpeed need not know it nor compile one.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # Scattering stage inputs over tensor ranks takes them for replicas; sequence parallelism breaks that.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        **_precision(config),
    }
    given = config.deepspeed
    result |= {key: deepcopy(value) for key in _PASSED_ON if (value := getattr(given, key)) is not None}
    result |= {key: getattr(given, key) for key in _PASSED_ON_WHEN_SET if key in given.model_fields_set}
    if given.comms_logger and given.comms_logger.get("enabled"):
        # DeepSpeed turns its log on when the section is there at all, whatever `enabled` says.
        result["comms_logger"] = deepcopy(given.comms_logger)
    problems = Problems(config.sources)
    _merge_extra(result, given.deepspeed_extra_args or {}, "deepspeed_extra_args", problems)
    problems.raise_any()
    return result


def _zero(config: Config) -> dict[str, Any]:
    zero = deepcopy(config.deepspeed.zero_optimization or {})
    zero["stage"] = config.parallel.zero_stage
    for name, retired in RETIRED_OFFLOAD.items():
        asked = offloads(zero.pop(retired, False))
        section = zero.pop(name, None)
        if offloads(section):
            zero[name] = section
        elif asked:
            zero[name] = {"device": "cpu"}
    return zero


def _precision(config: Config) -> dict[str, Any]:
    given, precision = config.deepspeed, config.model.precision
    sections: dict[str, Any] = {}
    for name, runs in (("fp16", "fp16"), ("bf16", "bfloat16")):
        kept = {key: value for key, value in (getattr(given, name) or {}).items() if key not in LEFTOVERS[name]}
        sections[name] = {**deepcopy(kept), "enabled": precision == runs}
    if given.data_types:
        sections["data_types"] = deepcopy(given.data_types)
    if given.communication_data_type:
        sections["communication_data_type"] = given.communication_data_type
    return sections


def _merge_extra(result: dict[str, Any], extra: dict[str, Any], path: str, problems: Problems) -> None:
    for key, value in extra.items():
        here = f"{path}.{key}"
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            _merge_extra(result[key], value, here, problems)
        elif key in result and result[key] != value:
            problems.add(here, f"{value!r} contradicts {result[key]!r}, which the other keys give; remove it here")
        else:
            result[key] = deepcopy(value)
