"""What a checkpoint holds of the learning rate, and which schedule a resumed run follows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox.config.deepspeed_schedules import SCHEDULES
from neox.config.learning_rate import LearningRate
from neox.errors import CheckpointError


@dataclass(frozen=True)
class LRSchedule(LearningRate):
    """A learning rate that can be saved and compared with a saved one."""

    def state_dict(self, iteration: int) -> dict[str, Any]:
        """Return the six fields that checkpoints hold under upstream's names, and those of wsd or of DeepSpeed."""
        state: dict[str, Any] = {
            "start_lr": self.peak,
            "warmup_iter": self.warmup,
            "num_iters": iteration,
            "decay_style": self.style,
            "end_iter": self.horizon,
            "min_lr": self.minimum,
        }
        return state | {name: getattr(self, attribute) for name, attribute in _fields(self.style).items()}

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


_STATE_FIELDS = {
    "start_lr": "peak",
    "warmup_iter": "warmup",
    "decay_style": "style",
    "end_iter": "horizon",
    "min_lr": "minimum",
}
_WSD_FIELDS = {"wsd_decay_fraction": "decay_fraction", "wsd_decay_shape": "decay_shape"}
_DEEPSPEED_FIELDS = {"start_lr": "peak", "decay_style": "style", "scheduler_params": "params"}


def _fields(style: Any) -> dict[str, str]:
    """What makes a schedule of this style, by the attribute it is."""
    if style in SCHEDULES:
        return _DEEPSPEED_FIELDS
    return _STATE_FIELDS | (_WSD_FIELDS if style == "wsd" else {})


def _from_state(saved: Mapping[str, Any]) -> LRSchedule:
    fields = _fields(saved.get("decay_style"))
    missing = [name for name in fields if name not in saved]
    if missing:
        raise CheckpointError(
            f"the checkpoint's learning-rate schedule lacks {', '.join(missing)}: set override_lr_scheduler"
        )
    others = {"minimum": 0.0, "warmup": 0.0, "horizon": saved.get("end_iter", 0)}
    return LRSchedule(**others | {attribute: saved[name] for name, attribute in fields.items()})


def _differences(configured: LRSchedule, saved: LRSchedule) -> list[str]:
    fields = _fields(configured.style if configured.style == saved.style else None)
    pairs = ((name, getattr(configured, field), getattr(saved, field)) for name, field in fields.items())
    return [
        f"{name} is {ours} in the config, {theirs} in the checkpoint" for name, ours, theirs in pairs if ours != theirs
    ]
