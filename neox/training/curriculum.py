"""The length of sequences while it grows: a pure function of the number of the step.

Li et al. 2022, "The Stability-Efficiency Dilemma: Investigating Sequence Length Warmup for Training GPT Models". The
schedules, their entries and their values are those of DeepSpeed's curriculum learning
(https://www.deepspeed.ai/tutorials/curriculum-learning), which no longer does it for whole models.
"""

import bisect
import math
from dataclasses import dataclass
from typing import Protocol

from neox.config import Config


class Curriculum(Protocol):
    """How long sequences are at each step of the training."""

    def length_at(self, step: int) -> int:
        """Tokens of a sequence at step 1, 2, ... of the run."""
        ...


@dataclass(frozen=True)
class RootCurriculum:
    """Growth by a root of the step: `fixed_root`, and with degree 1 `fixed_linear`.

    Attributes:
        shortest, longest: tokens at the beginning and at the end (`min_difficulty`, `max_difficulty`).
        steps: step at which the longest is reached (`total_curriculum_step`).
        multiple_of: lengths between are rounded down to a multiple of this (`difficulty_step`).
        degree: 2 grows by the square root (`root_degree`).
    """

    shortest: int
    longest: int
    steps: int
    multiple_of: int
    degree: float = 1.0

    def length_at(self, step: int) -> int:
        """Give shortest + (longest - shortest) x (step / steps)^(1 / degree), in whole multiples above the shortest."""
        share = (step / self.steps) ** (1.0 / self.degree)
        units = math.floor(self.shortest + share * (self.longest - self.shortest)) // self.multiple_of
        fewest = math.ceil(self.shortest / self.multiple_of)
        return min(self.multiple_of * max(units, fewest), self.longest)


@dataclass(frozen=True)
class DiscreteCurriculum:
    """Lengths by name: `fixed_discrete`.

    Attributes:
        lengths: tokens, one more than there are steps in `last_steps` (`difficulty`).
        last_steps: the last step of each length but the final one (`max_step`).
    """

    lengths: tuple[int, ...]
    last_steps: tuple[int, ...]

    def length_at(self, step: int) -> int:
        """The length whose steps hold this one."""
        return self.lengths[bisect.bisect_left(self.last_steps, step)]


def curriculum_of(config: Config) -> Curriculum | None:
    """The run's `curriculum_learning`; None where sequences have one length all the time."""
    entries = config.training.curriculum_learning
    if entries is None or not entries["enabled"]:
        return None
    schedule = entries["schedule_config"]
    if entries["schedule_type"] == "fixed_discrete":
        return DiscreteCurriculum(tuple(map(int, schedule["difficulty"])), tuple(map(int, schedule["max_step"])))
    return RootCurriculum(
        shortest=int(entries["min_difficulty"]),
        longest=int(entries["max_difficulty"]),
        steps=int(schedule["total_curriculum_step"]),
        multiple_of=int(schedule["difficulty_step"]),
        degree=float(schedule.get("root_degree", 1)),
    )
