"""Rules of DeepSpeed's `scheduler` section: its names and values, and what it takes the place of."""

from typing import Any

from neox.config.deepspeed_schedules import SCHEDULES, peak_rate, scheduled_betas
from neox.config.keys import mismatch, number, whole_number
from neox.config.optimization import OptimizerConfig, ScheduleConfig
from neox.config.problems import Problems, did_you_mean
from neox.config.training import TrainingConfig

_KEY = "scheduler"
_REPLACED = ("lr_decay_style", "lr_decay_iters", "lr_decay_fraction", "min_lr", "warmup", "wsd_decay_fraction")
_HAS_BETAS = ("adam", "adamw", "adam8bit", "cpu_adam", "cpu_torch_adam", "lion", "muon")
_INTEGERS = (
    "warmup_num_steps",
    "total_num_steps",
    "lr_range_test_step_size",
    "cycle_first_stair_count",
    "cycle_second_stair_count",
)
_SWITCHES = ("cycle_momentum", "lr_range_test_staircase")
_ABOVE_ZERO = ("warmup_num_steps", "total_num_steps", "lr_range_test_step_size", "cycle_first_step_size")
_INFINITE = 1e30
_FOLLOWS = {
    "cycle_second_step_size": "cycle_first_step_size",
    "cycle_second_stair_count": "cycle_first_stair_count",
}


def resolve_scheduler(
    schedule: ScheduleConfig,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    problems: Problems,
    notices: list[str],
) -> ScheduleConfig:
    """Check the section and fill in its defaults; an empty one is none."""
    section = schedule.scheduler
    if not section:
        return schedule.model_copy(update={"scheduler": None})
    name = _name(section, problems)
    params = section.get("params") or {}
    if not isinstance(params, dict):
        problems.add(f"{_KEY}.params", f"expected a mapping, got {params!r}")
    elif name and _check_params(name, params, problems):
        complete = _complete(name, params, optimizer)
        _check_momentum(name, complete, training, problems)
        _announce(schedule, name, complete, optimizer, notices)
        if params.get("cycle_momentum") and not complete["cycle_momentum"]:
            notices.append(f"scheduler.params.cycle_momentum has no effect: {optimizer.type} has no betas")
        return schedule.model_copy(update={"scheduler": {"type": name, "params": complete}})
    return schedule


def _name(section: dict[str, Any], problems: Problems) -> str:
    """The schedule's name as DeepSpeed spells it; empty if there is none of that name."""
    for key in (key for key in section if key not in ("type", "params")):
        problems.add(f"{_KEY}.{key}", f"unknown key{did_you_mean(str(key), ('type', 'params')) or '; remove it'}")
    given, choices = section.get("type"), ", ".join(SCHEDULES)
    if given is None:
        problems.add(f"{_KEY}.type", f"not set; add one of {choices}")
        return ""
    name = {name.lower(): name for name in SCHEDULES}.get(str(given).lower(), "")
    if not name:
        problems.add(f"{_KEY}.type", f"{given!r} is unknown; supported: {choices}")
    return name


def _check_params(name: str, params: dict[str, Any], problems: Problems) -> bool:
    """Check that nothing is missing, unknown or of a wrong type; say whether that is so."""
    before, known = len(problems.lines), SCHEDULES[name]
    for key, default in known.items():
        if default is ... and params.get(key) is None:
            problems.add(f"{_KEY}.params", f"{name} needs {key}, and it is not set; add it")
    for key, value in params.items():
        if key not in known:
            mend = did_you_mean(str(key), known) or "; remove it"
            problems.add(f"{_KEY}.params.{key}", f"unknown argument of {name}{mend}")
        elif value is not None and (wrong := _wrong(key, value)):
            problems.add(f"{_KEY}.params.{key}", wrong)
    return len(problems.lines) == before


def _wrong(key: str, value: Any) -> str:
    if key == "warmup_type":
        return "" if value in ("log", "linear") else f"expected 'log' or 'linear', got {value!r}"
    if key in _SWITCHES:
        return mismatch(value, bool)
    if isinstance(value, list):
        return f"expected a number, got {value!r}; one value for all parameters"
    return mismatch(value, int if key in _INTEGERS else float) or _out_of_bounds(key, value)


def _out_of_bounds(key: str, value: Any) -> str:
    amount = number(value)
    if not abs(amount) < _INFINITE:
        return f"expected a finite number, got {value!r}"
    if key in _ABOVE_ZERO and amount <= 0:
        return f"expected more than 0, got {value!r}"
    if key.endswith("_mom") and not 0 <= amount < 1:
        return f"expected 0 to below 1, got {value!r}"
    return "" if amount >= 0 or key == "decay_mom_rate" else f"expected at least 0, got {value!r}"


def _complete(name: str, params: dict[str, Any], optimizer: OptimizerConfig) -> dict[str, Any]:
    """All parameters of a schedule, numbers as such."""
    given = {key: _plain(key, value) for key, value in params.items() if value is not None}
    complete = {**SCHEDULES[name], **given}
    for key, other in _FOLLOWS.items():
        if key in complete and complete[key] is None:
            complete[key] = complete[other]
    if name == "WarmupLR" and complete["warmup_max_lr"] is None:
        complete["warmup_max_lr"] = optimizer.lr
    if name == "OneCycle" and optimizer.type not in _HAS_BETAS:
        complete["cycle_momentum"] = False
    return complete


def _plain(key: str, value: Any) -> Any:
    if key == "warmup_type" or key in _SWITCHES:
        return value
    return whole_number(value) if key in _INTEGERS else float(number(value))


def _check_momentum(name: str, complete: dict[str, Any], training: TrainingConfig, problems: Problems) -> None:
    """Check that the momentum is one to the end of the run."""
    last = scheduled_betas(training.train_iters or 0, name, complete)
    if last is not None and not 0 <= last[0] < 1:
        problems.add(
            f"{_KEY}.params.decay_mom_rate",
            f"{complete['decay_mom_rate']:g} takes the momentum to {last[0]:.3g} by iteration {training.train_iters}; "
            "lower it",
        )


def _announce(
    schedule: ScheduleConfig,
    name: str,
    complete: dict[str, Any],
    optimizer: OptimizerConfig,
    notices: list[str],
) -> None:
    """Name the settings that the section takes the place of."""
    unused = [key for key in _REPLACED if key in schedule.model_fields_set]
    # Muon's adamw_lr is in proportion to optimizer.params.lr, whatever moves the rate.
    if optimizer.is_given and optimizer.type != "muon" and peak_rate(name, complete, optimizer.lr) != optimizer.lr:
        unused.append("optimizer.params.lr")
    if unused:
        verb = "has" if len(unused) == 1 else "have"
        notices.append(f"{', '.join(unused)} {verb} no effect: scheduler {name} sets the learning rate")
    if complete.get("cycle_momentum"):
        notices.append("optimizer.params.betas has no effect: scheduler OneCycle moves the first; the second is 0.99")
