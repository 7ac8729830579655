"""Rules of training: optimizer, schedule, data, length of the run, checkpoints."""

import math
import re
from typing import Any

from neox.config.data import DataConfig
from neox.config.keys import mismatch, number
from neox.config.optimization import OptimizerConfig, ScheduleConfig
from neox.config.problems import Problems, did_you_mean
from neox.config.training import CheckpointConfig, TrainingConfig

DEFAULT_LR = 1e-3
_ADAM = {"betas": [0.9, 0.999], "eps": 1e-8}
_DEFAULTS: dict[str, dict[str, Any]] = {"adam": _ADAM, "adamw": _ADAM, "sgd": {"momentum": 0.0}}
_FIXED = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False, "torch_adam": True}
"""Arguments of DeepSpeed's Adam that have one supported value here."""


def resolve_optimizer(optimizer: OptimizerConfig, problems: Problems, notices: list[str]) -> OptimizerConfig:
    """Fill in the optimizer's arguments and move lr and weight_decay out of them."""
    is_given = bool({"type", "params"} & optimizer.model_fields_set)
    if not is_given:
        return optimizer
    if "type" not in optimizer.model_fields_set:
        problems.add("optimizer", "has no type; add type: Adam")
    params = {**_DEFAULTS[optimizer.type], **_checked_params(optimizer, problems)}
    if "lr" not in params:
        notices.append(f"optimizer.params.lr is not set: {DEFAULT_LR:g} is used")
    weight_decay = params.pop("weight_decay", optimizer.weight_decay)
    if "weight_decay" in optimizer.model_fields_set and weight_decay != optimizer.weight_decay:
        problems.add("optimizer.params.weight_decay", f"contradicts weight_decay {optimizer.weight_decay}; remove it")
    return optimizer.model_copy(
        update={
            "lr": params.pop("lr", DEFAULT_LR),
            "params": params,
            "weight_decay": weight_decay,
            "is_given": True,
        }
    )


def _checked_params(optimizer: OptimizerConfig, problems: Problems) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    known = {"lr", "weight_decay", *_DEFAULTS[optimizer.type]}
    fixed = _FIXED if optimizer.type != "sgd" else {}
    for name, value in optimizer.params.items():
        key = f"optimizer.params.{name}"
        if name in fixed:
            if value != fixed[name]:
                problems.add(key, f"{value!r} is not supported yet; remove it")
        elif name not in known:
            problems.add(key, f"unknown argument of {optimizer.type}{did_you_mean(name, known) or '; remove it'}")
        elif wrong := _wrong_betas(value) if name == "betas" else _wrong_amount(name, value):
            problems.add(key, wrong)
        else:
            checked[name] = [float(number(beta)) for beta in value] if name == "betas" else float(number(value))
    return checked


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
    return f"expected less than 1, got {value!r}" if name == "momentum" and amount >= 1 else ""


def resolve_schedule(
    schedule: ScheduleConfig, training: TrainingConfig, optimizer: OptimizerConfig, problems: Problems
) -> ScheduleConfig:
    """Find the decay horizon: lr_decay_iters, else train_iters x lr_decay_fraction, else train_iters."""
    if optimizer.is_given and schedule.min_lr > optimizer.lr:
        problems.add("min_lr", f"{schedule.min_lr:g} is above optimizer.params.lr {optimizer.lr:g}; lower it")
    if schedule.override_lr_scheduler and schedule.use_checkpoint_lr_scheduler:
        problems.add("override_lr_scheduler", "contradicts use_checkpoint_lr_scheduler; keep one of them")
    if schedule.lr_decay_iters or training.train_iters is None:
        return schedule
    fraction = 1.0 if schedule.lr_decay_fraction is None else schedule.lr_decay_fraction
    return schedule.model_copy(update={"lr_decay_iters": math.floor(training.train_iters * fraction)})


def resolve_training(training: TrainingConfig, data: DataConfig, problems: Problems) -> TrainingConfig:
    """Check the length of the run and decide which parts of the data are evaluated."""
    if training.train_epochs is not None:
        if training.train_iters is not None:
            problems.add("train_epochs", "set together with train_iters; keep one of them")
        weights = set(data.train_data_weights or (1.0,))
        for key, clash in (
            ("weight_by_num_documents", data.weight_by_num_documents),
            ("train_data_weights", len(weights) > 1),
            ("pack_impl", data.pack_impl != "packed"),
        ):
            if clash:
                problems.add("train_epochs", f"one pass over the data is not defined with {key}; set train_iters")
    evaluates = training.eval_iters > 0
    given = training.model_fields_set
    return training.model_copy(update={name: evaluates for name in ("do_valid", "do_test") if name not in given})


def check_data(data: DataConfig, problems: Problems) -> None:
    """Check that datasets, labels and weights go together."""
    lists = {split: getattr(data, f"{split}_data_paths") for split in ("train", "valid", "test")}
    named = [f"{split}_data_paths" for split, paths in lists.items() if paths]
    if data.data_path is not None and named:
        problems.add("data_path", f"set together with {named[0]}; keep one of them")
    for split, paths in lists.items():
        if named and not paths and data.data_path is None:
            problems.add(named[0], f"{split}_data_paths is missing; set all three lists, or data_path and split")
        for kind in ("label_data_paths", "data_weights"):
            extra = getattr(data, f"{split}_{kind}")
            if extra is not None and len(extra) != len(paths or ()):
                problems.add(
                    f"{split}_{kind}",
                    f"has {len(extra)} entries, and {split}_data_paths has {len(paths or ())}",
                )
        weights = getattr(data, f"{split}_data_weights") or (1.0,)
        if min(weights) < 0 or not 0 < sum(weights) < math.inf:
            problems.add(f"{split}_data_weights", f"expected weights of at least 0, not all 0, got {list(weights)}")
    _check_split(data.split, problems)


def _check_split(split: str, problems: Problems) -> None:
    parts = [part.strip() for part in re.split("[,/]", split)]
    if len(parts) > 3 or not all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", part) for part in parts):
        problems.add("split", f"expected up to three proportions such as '969, 30, 1', got {split!r}")
    elif sum(map(float, parts)) == 0:
        problems.add("split", f"expected a proportion above 0, got {split!r}")


def check_checkpoint(checkpoint: CheckpointConfig, problems: Problems) -> None:
    """Check that it is said when to save."""
    factor = checkpoint.checkpoint_factor
    if checkpoint.save is not None and factor is None and not checkpoint.extra_save_iters:
        problems.add("save", "set without checkpoint_factor or extra_save_iters; add checkpoint_factor: 1000")
    if checkpoint.checkpoint_scale == "linear" and isinstance(factor, float):
        problems.add("checkpoint_factor", f"expected a whole number of iterations, got {factor!r}")
    if checkpoint.checkpoint_scale == "log" and factor is not None and factor <= 1:
        problems.add("checkpoint_factor", f"expected a ratio above 1 with checkpoint_scale log, got {factor!r}")
    if any(iteration < 0 for iteration in checkpoint.extra_save_iters):
        problems.add("extra_save_iters", f"expected iterations of at least 0, got {list(checkpoint.extra_save_iters)}")
