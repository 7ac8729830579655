"""The learning rate of every step, in closed form: a pure function of the number of steps taken."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from neox.config.deepspeed_schedules import peak_rate, scheduled_betas, scheduled_rate
from neox.errors import ConfigError

if TYPE_CHECKING:
    from neox.config.config import Config

# Upstream's decay constant, ln 2 to three digits: one halving over the horizon.
_EXPONENTIAL_RATE = 0.693


@dataclass(frozen=True)
class LearningRate:
    """Warmup to a peak, then decay towards a floor.

    Attributes:
        peak: highest learning rate, reached at the end of the warmup.
        minimum: floor of every style but `constant`.
        style: "constant", "linear", "cosine", "exponential", "inverse_sqrt", "wsd", or one of DeepSpeed's schedules.
        warmup: length of the warmup in steps; not rounded, as upstream (fraction x horizon).
        horizon: step at which the decay of linear, cosine and wsd ends.
        decay_fraction: share of the horizon that is the decay of wsd.
        decay_shape: curve of the decay of wsd: "linear", "cosine" or "1-sqrt".
        params: all parameters of a schedule of DeepSpeed's, which knows neither minimum nor warmup of ours.
    """

    peak: float
    minimum: float
    style: str
    warmup: float
    horizon: int
    decay_fraction: float = 0.1
    decay_shape: str = "1-sqrt"
    params: Mapping[str, Any] | None = None

    @classmethod
    def from_config(cls, config: "Config") -> Self:
        """Take `lr` and the section of the schedule, with the resolved `lr_decay_iters`.

        Raises:
            ConfigError: the horizon is unknown, because neither train_iters nor lr_decay_iters is given.
        """
        settings = config.schedule
        horizon = settings.lr_decay_iters
        if not horizon:
            raise ConfigError("the learning rate has no horizon: set train_iters or lr_decay_iters")
        if settings.scheduler:
            name, params = settings.scheduler["type"], settings.scheduler["params"]
            peak = peak_rate(name, params, config.optimizer.lr)
            return cls(peak=peak, minimum=0.0, style=name, warmup=0.0, horizon=horizon, params=params)
        return cls(
            peak=config.optimizer.lr,
            minimum=settings.min_lr,
            style=settings.lr_decay_style,
            warmup=settings.warmup * horizon,
            horizon=horizon,
            decay_fraction=settings.wsd_decay_fraction,
            decay_shape=settings.wsd_decay_shape,
        )

    def lr_at(self, iteration: int) -> float:
        """Learning rate after `iteration` steps, which is the one that step `iteration + 1` uses."""
        return learning_rate(iteration, self)

    def betas_at(self, iteration: int) -> tuple[float, float] | None:
        """Adam's betas after `iteration` steps, where the schedule moves them."""
        return None if self.params is None else scheduled_betas(iteration, self.style, self.params)


def learning_rate(step: int, schedule: LearningRate) -> float:
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
        wsd           m + (p - m) f(y)                  warmup, stable, decay; Hu et al. 2024 (MiniCPM), section 4

    For wsd y = (step - s) / (e - s) is the share of its decay that is over, held between 0 and 1, where the decay
    starts at s = e - decay_fraction e, and f(y) is 1 - y (linear), (1 + cos(pi y)) / 2 (cosine) or 1 - sqrt(y)
    (1-sqrt; Hägele et al. 2024, section 3.1, found it best).

    Step numbering and values are upstream's, except where those were wrong: a warmup below one step gives p
    and not p / w (25 times the peak for w = 0.04), and cosine stays at m after the horizon instead of
    rising again. Kept although unusual: m is the floor of linear decay and not its end point, so the rate
    arrives there before the horizon; exponential decay halves the rate and does not aim at m.

    A schedule of DeepSpeed's is DeepSpeed's at every step: see `scheduled_rate`.
    """
    if schedule.params is not None:
        return scheduled_rate(step, schedule.style, schedule.params, schedule.peak)
    if schedule.warmup > 0 and (step == 0 or step <= schedule.warmup):
        return schedule.peak * min(1.0, max(step, 1) / schedule.warmup)
    return max(_decayed(step, schedule), schedule.minimum)


def _decayed(step: int, schedule: LearningRate) -> float:
    peak, minimum = schedule.peak, schedule.minimum
    match schedule.style:
        case "constant":
            return peak
        case "linear":
            return peak * (1.0 - min(1.0, _progress(step, schedule)))
        case "cosine":
            return minimum + (peak - minimum) * _half_cosine(min(1.0, _progress(step, schedule)))
        case "exponential":
            return peak * math.exp(-_EXPONENTIAL_RATE * _progress(step, schedule))
        case "inverse_sqrt":
            return peak * math.sqrt(max(schedule.warmup, 1.0) / max(step, 1))
        case "wsd":
            return minimum + (peak - minimum) * _final_decay(step, schedule)
    raise AssertionError(f"unknown lr_decay_style {schedule.style!r} passed the config's check")


def _progress(step: int, schedule: LearningRate) -> float:
    # A warmup that takes the whole horizon leaves no decay.
    length = schedule.horizon - schedule.warmup
    return (step - schedule.warmup) / length if length > 0 else 1.0


def _final_decay(step: int, schedule: LearningRate) -> float:
    """Share of the way from the minimum to the peak that is left, of wsd."""
    length = schedule.decay_fraction * schedule.horizon
    y = min(1.0, max(0.0, (step - (schedule.horizon - length)) / length))
    match schedule.decay_shape:
        case "linear":
            return 1.0 - y
        case "cosine":
            return _half_cosine(y)
        case "1-sqrt":
            return 1.0 - math.sqrt(y)
    raise AssertionError(f"unknown wsd_decay_shape {schedule.decay_shape!r} passed the config's check")


def _half_cosine(x: float) -> float:
    return (math.cos(math.pi * x) + 1.0) / 2.0
