"""Which steps are bad, and what the configuration does about them."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neox.config.reliability import ReliabilityConfig, StepAction


@dataclass(frozen=True)
class Finding:
    """A bad step.

    Attributes:
        reason: what was seen, with the figure.
        action: what is done about it.
        key: the key that says so.
    """

    reason: str
    action: StepAction
    key: str

    def __str__(self) -> str:
        return f"{self.reason} ({self.key}: {self.action})"


class Rules:
    """Judges steps by loss and gradient, and remembers the losses that say what is usual.

    Attributes:
        recent: losses of the last updates; empty where spikes are not looked for.
    """

    def __init__(self, settings: ReliabilityConfig, *, loss_scaler: Any | None = None) -> None:
        """Take the keys.

        Args:
            settings: the keys.
            loss_scaler: DeepSpeed's, of fp16; None in other precisions.
        """
        self.settings = settings
        self.recent: deque[float] = deque(maxlen=settings.loss_spike_window)
        self._scaler = loss_scaler
        self._overflows = 0

    @property
    def need_every_loss(self) -> bool:
        """Whether a step has to be judged before its update, which makes it wait for the device."""
        settings = self.settings
        return (
            self._scaler is not None  # with which DeepSpeed waits anyway
            or settings.on_bad_loss != "stop"
            or settings.gradient_norm_limit is not None
            or settings.loss_spike_deviations is not None
        )

    def begin(self, recent: Sequence[float]) -> None:
        """Go on with the losses of a run that is taken up."""
        self.recent.clear()
        self.recent.extend(recent)
        self._overflows = 0

    def note(self, loss: float) -> None:
        """Take in the loss of a step whose weights were updated."""
        if self.settings.loss_spike_deviations is not None:
            self.recent.append(loss)

    def judge(self, loss: float, norm: float) -> Finding | None:
        """What is wrong with a step; None if nothing is, or if DeepSpeed takes care of it.

        Args:
            loss: its mean loss.
            norm: of its gradient before clipping, infinite where it is not finite.
        """
        settings = self.settings
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return None if self._falls(loss, norm) else self.not_finite(loss, norm)
        self._overflows = 0
        if settings.gradient_norm_limit is not None and norm > settings.gradient_norm_limit:
            reason = f"gradient norm {norm:.6g} above gradient_norm_limit {settings.gradient_norm_limit:g}"
            return Finding(reason, settings.on_large_gradient, "on_large_gradient")
        return self._spike(loss)

    def not_finite(self, loss: float, norm: float) -> Finding:
        """The finding about a loss or a gradient that is NaN or infinite."""
        what = f"gradient norm {norm}" if math.isfinite(loss) else f"loss {loss}"
        return Finding(what, self.settings.on_bad_loss, "on_bad_loss")

    def _falls(self, loss: float, norm: float) -> bool:
        """Whether DeepSpeed leaves out a step of fp16 and lowers the loss scale, as it does from time to time."""
        if self._scaler is None or math.isfinite(norm):
            return False
        if math.isfinite(loss):
            return not self._scaler.dynamic or not self._is_lowest()
        self._overflows += 1
        return self._scaler.dynamic and not self._is_lowest() and self._overflows <= self.settings.max_skips

    def _is_lowest(self) -> bool:
        """Whether the scale would have to fall now and cannot, where DeepSpeed would end the run with a traceback."""
        scaler = self._scaler
        assert scaler is not None, "there is a scale"
        falls_now = scaler.delayed_shift == 1 or scaler.cur_hysteresis == 1
        return bool(falls_now and scaler.cur_scale <= scaler.min_scale)

    def _spike(self, loss: float) -> Finding | None:
        settings = self.settings
        if settings.loss_spike_deviations is None or len(self.recent) < settings.loss_spike_window:
            return None
        mean = math.fsum(self.recent) / len(self.recent)
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in self.recent) / len(self.recent))
        if loss <= mean + settings.loss_spike_deviations * deviation:
            return None
        reason = (
            f"loss {loss:.6g}, {settings.loss_spike_deviations:g} standard deviations of {deviation:.3g} above the "
            f"mean {mean:.6g} of the last {len(self.recent)} updates"
        )
        return Finding(reason, settings.on_loss_spike, "on_loss_spike")
