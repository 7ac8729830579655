"""What a long run does about its own end, lost processes, bad steps, silent corruption and failing disks."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from neox.config.keys import Float, Int, Lower, Section, Text, number, setting

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)")


def seconds(value: Any) -> Any:
    """Read "12:00:00" and "2-12:00:00" (days, hours, minutes, seconds) as Slurm does; leave the rest to the type check.

    YAML itself reads 12:00:00 without quotes as a number of seconds.
    """
    if not isinstance(value, str):
        return value
    if match := _CLOCK.fullmatch(value.strip()):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
    found = number(value)
    if isinstance(found, str):
        raise PydanticCustomError("seconds", "a number of seconds, H:MM:SS or D-HH:MM:SS")
    return found


Seconds = Annotated[float, BeforeValidator(seconds), Field(allow_inf_nan=False)]
StepAction = Annotated[Literal["stop", "skip", "skip_batch", "rewind"], Lower]

_ACTIONS = (
    "stop; skip: leave out this update; skip_batch: leave out this update, and the batch too whenever the run comes to "
    "it again; rewind: go back to the newest checkpoint, and leave out the data around this step."
)


class ReliabilityConfig(Section):
    """What keeps a run going, and what ends it."""

    time_limit: Seconds | None = setting(
        None,
        "Seconds, or H:MM:SS, after which the run saves and ends; counted from the start of the command.",
        gt=0,
        rule="The time of two steps and of a save, with async_save of two, is kept free before it.",
    )
    stop_file: Text | None = setting(
        None,
        "The run saves and ends when this file appears, and removes it; absent: the file STOP in the folder of save.",
        rule="One that is there before the run starts ends it before its first step.",
    )
    requeue_status: Int = setting(
        0,
        "Exit status of a run that a signal or time_limit ended before train_iters.",
        ge=0,
        le=255,
        rule="For schedulers that start a job again by its status, 75 say; SIGINT and stop_file always end with 0.",
    )
    distributed_timeout: Seconds = setting(
        600.0,
        "Seconds, or H:MM:SS, in which every process must answer and get on; else all end and name the one.",
        gt=0,
        le=86_400.0,
        rule="Also the time in which all must have come at the start; start, saves and evaluations may take longer.",
    )
    max_restarts: Int = setting(
        0,
        "How often train.py, where it starts the processes, starts them again after one was lost.",
        ge=0,
        rule="In a row: a new checkpoint sets the count to 0. From the newest whole checkpoint of save, which must be "
        "set. Under torchrun, Slurm and Kubernetes their own limit counts.",
    )
    elastic: bool = setting(
        False,
        "Let a run that is taken up have more or fewer data-parallel ranks, with the same global batch.",
        rule="Needs train_batch_size, or the same folder as load and save, whose checkpoint knows it; the micro batch "
        "is at most that of the configuration. With launcher: ssh, hosts that do not answer are left out.",
    )
    auto_resume: bool | None = setting(
        None,
        "Go on from the newest whole checkpoint in save, whatever load says, if there is one.",
        rule="Absent: only where a launcher or a scheduler has started the run again.",
    )
    on_bad_loss: StepAction = setting(
        "stop",
        f"What to do about a loss, or a gradient, that is NaN or infinite: {_ACTIONS}",
        rule="stop looks before each report and save; the others look before each update. In fp16 a step counts where "
        "the loss scale cannot fall any more, or after max_skips such losses in a row.",
    )
    gradient_norm_limit: Float | None = setting(
        None, "Norm of the gradient, before clipping, above which on_large_gradient is done.", gt=0
    )
    on_large_gradient: StepAction = setting("skip", f"What to do about a norm above gradient_norm_limit: {_ACTIONS}")
    loss_spike_deviations: Float | None = setting(
        None,
        "A loss this many standard deviations above the mean of the last loss_spike_window losses is a spike.",
        gt=0,
    )
    loss_spike_window: Int = setting(128, "Steps whose losses say what is usual.", ge=8)
    on_loss_spike: StepAction = setting("rewind", f"What to do about a spike: {_ACTIONS}", rule="rewind needs save.")
    rewind_window: Int = setting(
        0, "Steps before and after a bad one whose data are left out too after a rewind.", ge=0
    )
    max_skips: Int = setting(
        10, "Steps left out in a row, and rewinds without a new checkpoint between them, before the run stops.", ge=1
    )
    determinism: bool = setting(
        False,
        "Make a run on the same machine and layout repeat bit for bit.",
        rule="Slower: only kernels that add in a fixed order. An operation that has none ends the run by name.",
    )
    replica_check_interval: Int = setting(
        0,
        "Steps between comparisons of the weights that several ranks hold copies of; 0 for none.",
        ge=0,
        rule="Then before every save too: no checkpoint is made of copies that differ. Which copies there are depends "
        "on the layout.",
    )
    on_replica_mismatch: Annotated[Literal["stop", "rewind"], Lower] = setting(
        "stop", "What to do where copies differ: stop, or rewind to the newest checkpoint, with no data left out."
    )
    straggler_factor: Float | None = setting(
        None,
        "Name ranks whose own time for a step is this many times the median of the others in their pipeline stage.",
        gt=1,
        rule="At every log_interval. Own time is without the waiting in collectives.",
    )
    io_retry_time: Seconds = setting(
        120.0,
        "Seconds, or H:MM:SS, in which a failed read of data or a failed save is tried again, with growing pauses.",
        ge=0,
        rule="At most half of distributed_timeout, in which every process must get on.",
    )

    @property
    def retry_time(self) -> float:
        """Seconds in which reads and saves are tried again."""
        return min(self.io_retry_time, self.distributed_timeout / 2)


OTHER_KEYS = ()
