"""The learning rate of every step, in closed form: a pure function of the number of steps taken."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neox.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from neox.config import Config

# Upstream's decay constant, ln 2 to three digits: one halving over the horizon.
_EXPONENTIAL_RATE = 0.693


@dataclass(frozen=True)
class LRSchedule:
    """Warmup to a peak, then decay towards a floor.

    Attributes:
        peak: highest learning rate, reached at the end of the warmup.
        minimum: floor of every style but `constant`.
        style: "constant", "linear", "cosine", "exponential" or "inverse_sqrt".
        warmup: length of the warmup in steps; not rounded, as upstream (fraction x horizon).
        horizon: step at which the decay of linear and cosine ends.
    """

    peak: float
    minimum: float
    style: str
    warmup: float
    horizon: int

    @classmethod
    def from_config(cls, config: "Config") -> "LRSchedule":
        """Take `lr`, `min_lr`, `lr_decay_style`, `warmup` and the resolved `lr_decay_iters`.

        Raises:
            ConfigError: the horizon is unknown, because neither train_iters nor lr_decay_iters is given.
        """
        horizon = config.schedule.lr_decay_iters
        if horizon is None:
            raise ConfigError("the learning rate has no horizon: set train_iters or lr_decay_iters")
        return cls(
            peak=config.optimizer.lr,
            minimum=config.schedule.min_lr,
            style=config.schedule.lr_decay_style,
            warmup=config.schedule.warmup * horizon,
            horizon=horizon,
        )

    def lr_at(self, iteration: int) -> float:
        """Learning rate after `iteration` steps, which is the one that step `iteration + 1` uses."""
        return learning_rate(iteration, self)

    def state_dict(self, iteration: int) -> dict[str, float | int | str]:
        """Return the six fields that checkpoints hold, under upstream's names."""
        return {
            "start_lr": self.peak,
            "warmup_iter": self.warmup,
            "num_iters": iteration,
            "decay_style": self.style,
            "end_iter": self.horizon,
            "min_lr": self.minimum,
        }

    def reconcile(
        self, saved: Mapping[str, Any], *, override_lr_scheduler: bool, use_checkpoint_lr_scheduler: bool
    ) -> "LRSchedule":
        """Decide between this schedule and the one in a checkpoint (`saved`, as from `state_dict`).

        Returns:
            This schedule with `override_lr_scheduler`, the saved one with `use_checkpoint_lr_scheduler`; with
            neither the two must agree.

        Raises:
            CheckpointError: they differ and no choice is made, both choices are, or fields are missing.
        """
        if override_lr_scheduler and use_checkpoint_lr_scheduler:
            raise CheckpointError(
                "override_lr_scheduler and use_checkpoint_lr_scheduler exclude each other: set one of them"
            )
        if override_lr_scheduler:
            return self
        loaded = _from_state(saved)
        if use_checkpoint_lr_scheduler or not (differences := _differences(self, loaded)):
            return loaded
        raise CheckpointError(
            f"the learning-rate schedule differs from the checkpoint's: {'; '.join(differences)}: set "
            "override_lr_scheduler to use the config's or use_checkpoint_lr_scheduler to use the checkpoint's"
        )


def learning_rate(step: int, schedule: LRSchedule) -> float:
    """Learning rate after `step` completed steps; step `step + 1` of the training uses it.

    So the first step uses `learning_rate(0)`, a checkpoint at step k resumes with `learning_rate(k)`, and a
    step skipped for an overflow leaves the rate alone. With w the warmup, e the horizon, p the peak, m the
    minimum and x = (step - w) / (e - w), the share of the decay that is over:

        warmup        p step / w                        step <= w; step 0 counts as step 1
        constant      p
        linear        max(m, p (1 - x))                 x held at 1 after the horizon
        cosine        m + (p - m) (1 + cos(pi x)) / 2   x held at 1; Loshchilov & Hutter 2017, eq. 5
        exponential   max(m, p exp(-0.693 x))           halves over the horizon, and goes on after it
        inverse_sqrt  max(m, p sqrt(max(w, 1) / step))  Vaswani et al. 2017, eq. 3; knows no horizon

    Step numbering and values are upstream's, except where those were wrong: a warmup below one step gives p
    and not p / w (25 times the peak for w = 0.04), and cosine stays at m after the horizon instead of
    rising again. Kept although unusual: m is the floor of linear decay and not its end point, so the rate
    arrives there before the horizon; exponential decay halves the rate and does not aim at m.
    """
    if schedule.warmup > 0 and (step == 0 or step <= schedule.warmup):
        return schedule.peak * min(1.0, max(step, 1) / schedule.warmup)
    return max(_decayed(step, schedule), schedule.minimum)


def _decayed(step: int, schedule: LRSchedule) -> float:
    peak, minimum = schedule.peak, schedule.minimum
    match schedule.style:
        case "constant":
            return peak
        case "linear":
            return peak * (1.0 - min(1.0, _progress(step, schedule)))
        case "cosine":
            x = min(1.0, _progress(step, schedule))
            return minimum + (peak - minimum) * (math.cos(math.pi * x) + 1.0) / 2.0
        case "exponential":
            return peak * math.exp(-_EXPONENTIAL_RATE * _progress(step, schedule))
        case "inverse_sqrt":
            return peak * math.sqrt(max(schedule.warmup, 1.0) / max(step, 1))
    raise AssertionError(f"unknown lr_decay_style {schedule.style!r} passed the config's check")


def _progress(step: int, schedule: LRSchedule) -> float:
    # A warmup that takes the whole horizon leaves no decay.
    length = schedule.horizon - schedule.warmup
    return (step - schedule.warmup) / length if length > 0 else 1.0


_STATE_FIELDS = {
    "start_lr": "peak",
    "warmup_iter": "warmup",
    "decay_style": "style",
    "end_iter": "horizon",
    "min_lr": "minimum",
}


def _from_state(saved: Mapping[str, Any]) -> LRSchedule:
    missing = [name for name in _STATE_FIELDS if name not in saved]
    if missing:
        raise CheckpointError(
            f"the checkpoint's learning-rate schedule lacks {', '.join(missing)}: set override_lr_scheduler"
        )
    return LRSchedule(**{attribute: saved[name] for name, attribute in _STATE_FIELDS.items()})


def _differences(configured: LRSchedule, saved: LRSchedule) -> list[str]:
    pairs = ((name, getattr(configured, field), getattr(saved, field)) for name, field in _STATE_FIELDS.items())
    return [
        f"{name} is {ours} in the config, {theirs} in the checkpoint" for name, ours, theirs in pairs if ours != theirs
    ]
