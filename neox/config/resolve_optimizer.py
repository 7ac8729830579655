"""Rules of the optimizer and of the learning rate."""

import math
from typing import Any

from neox.config.deepspeed import DeepSpeedConfig
from neox.config.keys import mismatch, number
from neox.config.optimization import OptimizerConfig, ScheduleConfig
from neox.config.parallel import ParallelConfig
from neox.config.problems import Problems, did_you_mean
from neox.config.resolve_deepspeed import offload_device
from neox.config.resolve_scheduler import resolve_scheduler
from neox.config.training import TrainingConfig

DEFAULT_LR = 1e-3
_ADAM = {"betas": [0.9, 0.999], "eps": 1e-8}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "cpu_adam": _ADAM,
    "cpu_torch_adam": _ADAM,
    "adam8bit": _ADAM,
    "sgd": {"momentum": 0.0},
    "lion": {"betas": [0.9, 0.99]},
    "sm3": {"momentum": 0.0, "beta": 0.0, "eps": 1e-30},
    "madgrad_wd": {"momentum": 0.9, "eps": 1e-6},
    "muon": {
        "momentum": 0.95,
        "nesterov": True,
        "ns_steps": 5,
        "adjust_lr_fn": "match_rms_adamw",
        "adamw_lr": None,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
    },
}
_FIXED = {"adam_w_mode": True, "adamw_mode": True, "bias_correction": True, "amsgrad": False, "torch_adam": True}
"""Arguments of DeepSpeed's Adam that have one supported value here."""

_ELSEWHERE = {"max_grad_norm": "; remove it, gradient_clipping is what clips"}

_SWITCHES = ("nesterov",)
_BELOW_ONE = ("momentum", "beta")
_ADJUSTMENTS = ("match_rms_adamw", "original")


def resolve_optimizer(
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    deepspeed: DeepSpeedConfig,
    problems: Problems,
    notices: list[str],
) -> OptimizerConfig:
    """Fill in the optimizer's arguments and move lr and weight_decay out of them."""
    is_given = bool({"type", "params"} & optimizer.model_fields_set)
    if not is_given:
        return optimizer
    if "type" not in optimizer.model_fields_set and "optimizer.type" not in problems.wrong:
        problems.add("optimizer", "has no type; add type: Adam")
    if "optimizer.type" in problems.wrong:
        return optimizer  # the arguments are those of whatever was meant
    optimizer = _with_8_bit(optimizer, problems)
    defaults = {name: value for name, value in _DEFAULTS[optimizer.type].items() if value is not None}
    params = {**defaults, **_checked_params(optimizer, problems)}
    if "lr" not in params:
        notices.append(f"optimizer.params.lr is not set: {DEFAULT_LR:g} is used")
    weight_decay = params.pop("weight_decay", optimizer.weight_decay)
    if "weight_decay" in optimizer.model_fields_set and weight_decay != optimizer.weight_decay:
        problems.add("optimizer.params.weight_decay", f"contradicts weight_decay {optimizer.weight_decay}; remove it")
    resolved = optimizer.model_copy(
        update={
            "lr": params.pop("lr", DEFAULT_LR),
            "params": params,
            "weight_decay": weight_decay,
            "is_given": True,
        }
    )
    _check_type(resolved, parallel, deepspeed, problems, notices)
    return resolved


def _with_8_bit(optimizer: OptimizerConfig, problems: Problems) -> OptimizerConfig:
    if not optimizer.use_bnb_optimizer or optimizer.type == "adam8bit":
        return optimizer
    if optimizer.type not in ("adam", "adamw"):
        problems.add("use_bnb_optimizer", f"is for Adam, and optimizer.type is {optimizer.type}; remove one of them")
    return optimizer.model_copy(update={"type": "adam8bit"})


def _check_type(
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    deepspeed: DeepSpeedConfig,
    problems: Problems,
    notices: list[str],
) -> None:
    """Check what one kind of optimizer needs of the layout."""
    zero = deepspeed.zero_optimization or {}
    offloads = offload_device(deepspeed, "optimizer") != "none"
    kind, stage = optimizer.type, parallel.zero_stage
    if kind in ("cpu_adam", "cpu_torch_adam") and not offloads:
        problems.add(
            "optimizer.type",
            f"{kind} updates weights that lie in host memory; set zero_optimization.offload_optimizer: "
            "{device: cpu}, or type: Adam",
        )
    if kind in ("muon", "sm3", "adam8bit") and offloads:
        problems.add("optimizer.type", f"{kind} does not work with offload_optimizer; remove one of them")
    if kind in ("muon", "sm3") and stage == 3:
        problems.add(
            "optimizer.type",
            f"{kind} needs whole matrices, which ZeRO 3 cuts over all ranks; set zero_optimization.stage: 1 or 2",
        )
    if kind in ("muon", "sm3") and zero.get("round_robin_gradients"):
        problems.add("zero_optimization.round_robin_gradients", f"reorders what {kind} must find in order; remove it")
    if kind == "adam8bit" and stage == 3:
        problems.add("optimizer.type", "adam8bit does not work at ZeRO 3; set zero_optimization.stage: 1 or 2")
    if kind == "muon" and not optimizer.lr and optimizer.params.get("adamw_lr"):
        problems.add("optimizer.params.adamw_lr", "moves in proportion to lr, and lr is 0; raise lr")
    if kind == "sm3" and optimizer.weight_decay and "weight_decay" in optimizer.model_fields_set:
        notices.append(f"weight_decay {optimizer.weight_decay:g} has no effect: SM3 has no weight decay")


def _checked_params(optimizer: OptimizerConfig, problems: Problems) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    known = {"lr", "weight_decay", *_DEFAULTS[optimizer.type]}
    fixed = _FIXED if "adam" in optimizer.type else {}
    for name, value in optimizer.params.items():
        key = f"optimizer.params.{name}"
        if name in fixed:
            if value != fixed[name]:
                problems.add(key, f"{value!r} is not supported yet; remove it")
        elif name not in known:
            mend = _ELSEWHERE.get(name) or did_you_mean(str(name), known) or "; remove it"
            problems.add(key, f"unknown argument of {optimizer.type}{mend}")
        elif wrong := _wrong(name, value):
            problems.add(key, wrong)
        else:
            checked[name] = _plain(name, value)
    return checked


def _plain(name: str, value: Any) -> Any:
    """An argument that passed its check, as a number where it is one."""
    if name == "betas":
        return [float(number(beta)) for beta in value]
    if name in _SWITCHES or not isinstance(value, int | float | str) or name in ("adjust_lr_fn", "comm_backend_name"):
        return value
    amount = float(number(value))
    return int(amount) if name in ("ns_steps", "freeze_step") else amount


def _wrong(name: str, value: Any) -> str:
    if name == "betas":
        return _wrong_betas(value)
    if name in (*_SWITCHES, "cuda_aware"):
        return mismatch(value, bool)
    if name == "comm_backend_name":
        return mismatch(value, str)
    if name == "adjust_lr_fn":
        known = value in _ADJUSTMENTS
        return "" if known else f"expected {' or '.join(map(repr, _ADJUSTMENTS))}, got {value!r}"
    if name == "ns_steps":
        wrong = mismatch(value, int)
        return wrong or ("" if 1 <= number(value) < 100 else f"expected 1 to 99 steps, got {value!r}")
    return _wrong_amount(name, value)


def _wrong_betas(value: Any) -> str:
    if not isinstance(value, list | tuple) or len(value) != 2 or any(mismatch(beta, float) for beta in value):
        return f"expected two numbers such as [0.9, 0.95], got {value!r}"
    return "" if all(0 <= number(beta) < 1 for beta in value) else f"expected numbers from 0 to below 1, got {value!r}"


def _wrong_amount(name: str, value: Any) -> str:
    wrong = mismatch(value, float)
    if wrong:
        return wrong
    amount = number(value)
    if not math.isfinite(amount) or amount < 0:
        return f"expected a finite number, at least 0, got {value!r}"
    return f"expected less than 1, got {value!r}" if name in _BELOW_ONE and amount >= 1 else ""


def resolve_schedule(
    schedule: ScheduleConfig,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    problems: Problems,
    notices: list[str],
) -> ScheduleConfig:
    """Find the decay horizon: lr_decay_iters, else train_iters x lr_decay_fraction, else train_iters."""
    schedule = resolve_scheduler(schedule, training, optimizer, problems, notices)
    if optimizer.is_given and schedule.min_lr > optimizer.lr and not schedule.scheduler:
        problems.add("min_lr", f"{schedule.min_lr:g} is above optimizer.params.lr {optimizer.lr:g}; lower it")
    if schedule.override_lr_scheduler and schedule.use_checkpoint_lr_scheduler:
        problems.add("override_lr_scheduler", "contradicts use_checkpoint_lr_scheduler; keep one of them")
    _check_wsd(schedule, problems)
    if schedule.lr_decay_iters or training.train_iters is None:
        return schedule
    fraction = 1.0 if schedule.lr_decay_fraction is None else schedule.lr_decay_fraction
    return schedule.model_copy(update={"lr_decay_iters": max(1, math.floor(training.train_iters * fraction))})


def _check_wsd(schedule: ScheduleConfig, problems: Problems) -> None:
    style = schedule.lr_decay_style
    for key in ("wsd_decay_fraction", "wsd_decay_shape"):
        if getattr(schedule, key) != ScheduleConfig.model_fields[key].default and style != "wsd":
            problems.add(key, f"is for lr_decay_style wsd, and that is {style}; remove it")
    if style == "wsd" and schedule.warmup + schedule.wsd_decay_fraction > 1.0:
        keys = ["wsd_decay_fraction", "warmup"]
        # Whichever was set stands first, for its place.
        keys.sort(key=lambda key: key not in schedule.model_fields_set)
        first, second = (getattr(schedule, key) for key in keys)
        problems.add(keys[0], f"{first:g} and {keys[1]} {second:g} are more than the whole; lower one")
