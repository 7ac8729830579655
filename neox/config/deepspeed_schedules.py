"""DeepSpeed's learning-rate schedules in closed form, number by number those of `deepspeed.runtime.lr_schedules`."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

Params = Mapping[str, Any]

_WARMUP = {"warmup_min_lr": 0.0, "warmup_num_steps": 1000, "warmup_type": "log"}

SCHEDULES: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "WarmupLR": _WARMUP | {"warmup_max_lr": None},
        "WarmupDecayLR": _WARMUP | {"warmup_max_lr": 0.001, "total_num_steps": ...},
        "WarmupCosineLR": {
            "total_num_steps": ...,
            "warmup_min_ratio": 0.0,
            "warmup_num_steps": 1000,
            "cos_min_ratio": 0.0001,
            "warmup_type": "log",
        },
        "OneCycle": {
            "cycle_min_lr": ...,
            "cycle_max_lr": ...,
            "decay_lr_rate": 0.0,
            "cycle_first_step_size": 2000,
            "cycle_second_step_size": None,
            "cycle_first_stair_count": 0,
            "cycle_second_stair_count": None,
            "decay_step_size": 0,
            "cycle_momentum": True,
            "cycle_min_mom": 0.8,
            "cycle_max_mom": 0.9,
            "decay_mom_rate": 0.0,
        },
        "LRRangeTest": {
            "lr_range_test_min_lr": 0.001,
            "lr_range_test_step_size": 2000,
            "lr_range_test_step_rate": 1.0,
            "lr_range_test_staircase": False,
        },
    }
)
"""Parameters of each schedule with their defaults: `...` must be given, None follows from another one."""

_SECOND_BETA = 0.99
_PEAKS = {
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
    "OneCycle": "cycle_max_lr",
    "LRRangeTest": "lr_range_test_min_lr",
}


def peak_rate(name: str, params: Params, lr: float) -> float:
    """The rate that a schedule names itself: its highest, or that of the start of a range test.

    Args:
        name: one of `SCHEDULES`.
        params: all its parameters.
        lr: optimizer.params.lr, which WarmupCosineLR takes.
    """
    return float(params[_PEAKS[name]]) if name in _PEAKS else lr


def scheduled_rate(step: int, name: str, params: Params, peak: float) -> float:
    """Learning rate after `step` completed steps.

    DeepSpeed counts from the first step that was taken: with t = step - 1,

        WarmupLR        min + (max - min) g, g = ln(t + 1) / ln n (log) or t / n (linear) for t < n, 1 after it
        WarmupDecayLR   the same, and after the warmup g = (total - t) / (total - n), at least 0
        WarmupCosineLR  peak (r + (1 - r) g) with r = warmup_min_ratio, and after the warmup
                        peak (c + (1 - c) (1 + cos(pi y)) / 2), c = cos_min_ratio, y = (t - n + 1) / (total - n)
        OneCycle        min + (max - min) s, s rising to 1 and falling to 0; after the cycle min / (1 + rate intervals)
        LRRangeTest     min (1 + step_rate (t + 1) / step_size), the quotient rounded down in a staircase

    Before the first step it is the lowest rate: the first two steps of a warmup use the same one.

    Args:
        step: completed steps.
        name: one of `SCHEDULES`.
        params: all its parameters.
        peak: what WarmupCosineLR is a share of.
    """
    return _RATES[name](step - 1, params, peak)


def scheduled_betas(step: int, name: str, params: Params) -> tuple[float, float] | None:
    """Adam's betas after `step` completed steps, where the schedule moves them: OneCycle with cycle_momentum."""
    if name != "OneCycle" or not params["cycle_momentum"]:
        return None
    t, low, high = step - 1, params["cycle_min_mom"], params["cycle_max_mom"]
    if t < 0:
        return low, _SECOND_BETA
    if t < _cycle_length(params):
        return high - (high - low) * _cycle_share(t, params), _SECOND_BETA
    if not params["decay_step_size"]:
        return high, _SECOND_BETA
    return high * (1 + params["decay_mom_rate"] * _intervals_after_cycle(t, params)), _SECOND_BETA


def _warmup_share(t: int, params: Params) -> float | None:
    """Share of the warmup that is over; None after it."""
    length = max(2, params["warmup_num_steps"])
    if t >= length:
        return None
    return t / length if params["warmup_type"] == "linear" else (1.0 / math.log(length)) * math.log(t + 1)


def _warmup(t: int, params: Params, peak: float) -> float:
    low, high = params["warmup_min_lr"], params["warmup_max_lr"]
    if t < 0:
        return float(low)
    share = _warmup_share(t, params)
    if share is None:
        share = _linear_decay(t, params) if "total_num_steps" in params else 1.0
    return float(low + (high - low) * share)


def _linear_decay(t: int, params: Params) -> float:
    total, warmup = params["total_num_steps"], max(2, params["warmup_num_steps"])
    return max(0.0, (total - t) / max(1.0, total - warmup))


def _warmup_cosine(t: int, params: Params, peak: float) -> float:
    if t < 0:
        return 0.0
    share, low = _warmup_share(t, params), params["warmup_min_ratio"]
    if share is not None:
        return float(peak * (low + share * (1.0 - low)))
    floor, warmup = params["cos_min_ratio"], max(2, params["warmup_num_steps"])
    over = min(1.0, (t - warmup + 1) / max(1, params["total_num_steps"] - warmup))
    return float(peak * max(0.0, floor + (1.0 - floor) * ((1 + math.cos(math.pi * over)) / 2)))


def _one_cycle(t: int, params: Params, peak: float) -> float:
    low, high = params["cycle_min_lr"], params["cycle_max_lr"]
    if t < 0:
        return float(low)
    if t < _cycle_length(params):
        return float(low + (high - low) * _cycle_share(t, params))
    if not params["decay_step_size"]:
        return float(low)
    return float(low / (1 + params["decay_lr_rate"] * _intervals_after_cycle(t, params)))


def _cycle_length(params: Params) -> float:
    return float(params["cycle_first_step_size"]) + float(params["cycle_second_step_size"])


def _intervals_after_cycle(t: int, params: Params) -> float:
    return float((t - _cycle_length(params) + 1) / params["decay_step_size"])


def _cycle_share(t: int, params: Params) -> float:
    """Height of the cycle from 0 to 1; with stairs rounded down to the last one."""
    first, second, total = params["cycle_first_step_size"], params["cycle_second_step_size"], _cycle_length(params)
    place = (t + 1) % total
    is_rising = place <= first
    stairs = params["cycle_first_stair_count" if is_rising else "cycle_second_stair_count"]
    if stairs:
        return math.floor(place * stairs / first if is_rising else (total - place) * stairs / second) / stairs
    ratio, x = first / total, 1.0 + (t + 1) / total - math.floor(1 + (t + 1) / total)
    return float(x / ratio if x <= ratio else (x - 1) / (ratio - 1))


def _range_test(t: int, params: Params, peak: float) -> float:
    low = params["lr_range_test_min_lr"]
    if t < 0:
        return float(low)
    intervals = (t + 1) / params["lr_range_test_step_size"]
    if params["lr_range_test_staircase"]:
        intervals = math.floor(intervals)
    return float(low * (1 + params["lr_range_test_step_rate"] * intervals))


_RATES: MappingProxyType[str, Callable[[int, Params, float], float]] = MappingProxyType(
    {
        "WarmupLR": _warmup,
        "WarmupDecayLR": _warmup,
        "WarmupCosineLR": _warmup_cosine,
        "OneCycle": _one_cycle,
        "LRRangeTest": _range_test,
    }
)
