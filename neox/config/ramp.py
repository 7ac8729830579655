"""The size of the batch while it grows: a pure function of the samples consumed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neox.config.config import Config


@dataclass(frozen=True)
class BatchRamp:
    """From a small batch to the full one in equal steps (Brown et al. 2020, section 2.3; Megatron-LM's
    `rampup_batch_size`).

    Attributes:
        start: sequences of the first step.
        increment: sequences that are added at a time.
        samples: consumed sequences at which the full batch is reached; increments are spread over them evenly.
        full: `train_batch_size`.
    """

    start: int
    increment: int
    samples: int
    full: int

    @classmethod
    def from_config(cls, config: "Config") -> "BatchRamp | None":
        """Take `rampup_batch_size`; None where the batch is the same all the time."""
        if config.batch.rampup_batch_size is None:
            return None
        start, increment, samples = config.batch.rampup_batch_size
        return cls(start=start, increment=increment, samples=samples, full=config.batch.train_batch_size)

    def size_at(self, consumed_samples: int) -> int:
        """Sequences of the step that is made after so many have been consumed.

        With n = (full - start) / increment it is start + increment x floor(consumed x n / samples), held at full.
        """
        increments = (self.full - self.start) // self.increment
        return self.start + self.increment * min(increments, consumed_samples * increments // self.samples)
