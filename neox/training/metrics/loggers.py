"""Where metrics go: console, a JSONL file and TensorBoard; `services` has Weights & Biases and Comet.

Metric names are upstream's: `train/lm_loss`, `train/learning_rate`, `train/loss_scale`, `runtime/...`,
`validation/...`, `test/...`; ours besides, `train/skipped_iterations` and `train/nan_iterations`, which
upstream prints but does not record.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, SupportsFloat, TextIO, cast

from neox import results
from neox.errors import ConfigError
from neox.patience import is_mistake
from neox.training.logs.streams import CopiedStream, beside_copy
from neox.training.metrics.json_lines import JsonLinesSink
from neox.training.metrics.services import CometSink, optional_import, wandb_sinks

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from neox.config import Config

log = logging.getLogger(__name__)

Metrics = Mapping[str, float]


class Sink(Protocol):
    """One place that metrics go to.

    Attributes:
        refusals: what it raises where that place fails, which is no reason to end a run.
    """

    refusals: ClassVar[tuple[type[Exception], ...]]

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a step."""

    def progress(self, step: int) -> None:
        """Take note that `step` steps are done."""

    def close(self) -> None:
        """Write what is left and let go of files and connections."""


class MetricLog:
    """Passes metrics on to every sink; with no sinks, as on all ranks but 0, it does nothing."""

    def __init__(self, sinks: Iterable[Sink] = ()) -> None:
        self.sinks = tuple(sinks)
        self._failing: set[Sink] = set()

    @classmethod
    def from_config(cls, config: "Config", *, rank: int, environ: Mapping[str, str] = os.environ) -> Self:
        """Open what the config asks for: the file and the console always, the others by key.

        The file is `metrics.jsonl` in the folder of the run. Ranks other than 0 have none of all this, but a run at
        Weights & Biases with `wandb_init_all_ranks`.

        Raises:
            ConfigError: a package is missing, a folder is not ours to write, or a service refuses. One that is out of
                reach, and storage that fails, are a warning.
        """
        settings = config.logging
        if rank != 0:
            return cls(wandb_sinks(config, rank=rank, environ=environ) if settings.wandb_init_all_ranks else ())
        sinks: list[Sink] = [JsonLinesSink(run_folder(config) / "metrics.jsonl")]
        sinks += console_sinks(config.training.train_iters)
        if settings.tensorboard_dir:
            sinks.append(TensorBoardSink(Path(settings.tensorboard_dir)))
        sinks += wandb_sinks(config, rank=rank, environ=environ)
        if settings.use_comet:
            sinks.append(CometSink(config))
        return cls(sinks)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Record metrics after `step` steps.

        Values are numbers, or anything `float` takes; a tensor on a GPU costs a synchronisation here.
        """
        numbers = {name: _number(value) for name, value in metrics.items()}
        for sink in self.sinks:
            if self._do(sink, lambda sink=sink: sink.log(step, numbers)) and sink in self._failing:  # type: ignore[misc]
                self._failing.remove(sink)
                log.warning("%s works again", type(sink).__name__)

    def progress(self, step: int) -> None:
        """Move the progress bar to `step`; cheap enough for every step."""
        for sink in self.sinks:
            self._do(sink, lambda sink=sink: sink.progress(step))  # type: ignore[misc]

    def close(self) -> None:
        """Close all sinks."""
        for sink in self.sinks:
            self._do(sink, sink.close)

    def _do(self, sink: Sink, act: Callable[[], None]) -> bool:
        """Act on a sink; one line says that it fails, and it is tried again the next time. Whether it worked."""
        try:
            act()
        except sink.refusals as error:
            if sink not in self._failing:
                self._failing.add(sink)
                reason = " ".join(str(error).split())
                log.warning("%s fails (%s); training goes on, and it is tried again", type(sink).__name__, reason)
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LineSink:
    """One line of text for each report, in upstream's format."""

    refusals: ClassVar[tuple[type[Exception], ...]] = (OSError,)

    def __init__(self, total_steps: int | None, stream: TextIO) -> None:
        self.total_steps = total_steps
        self.stream = stream

    def log(self, step: int, metrics: Metrics) -> None:
        """Print the lines."""
        for line in console_lines(step, self.total_steps, metrics):
            print(line, file=self.stream, flush=True)

    def progress(self, step: int) -> None:
        """Nothing to print."""

    def close(self) -> None:
        """Give up what could not be printed: that fails no run, and `metrics.jsonl` has it."""
        try:
            self.stream.flush()
        except OSError:
            results.drop()


class BarSink:
    """A progress bar on a terminal, with evaluation results as lines above it."""

    refusals: ClassVar[tuple[type[Exception], ...]] = (OSError,)

    def __init__(self, total_steps: int | None) -> None:
        self.total_steps = total_steps
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def log(self, step: int, metrics: Metrics) -> None:
        """Show the newest figures beside the bar."""
        bar, task = self._at(step)
        if status := "  ".join(_render(_BESIDE_BAR, metrics)):
            bar.update(task, status=status)
        for line in evaluation_lines(step, metrics):
            bar.console.print(line.strip(), highlight=False, markup=False)

    def progress(self, step: int) -> None:
        """Move the bar."""
        bar, task = self._at(step)
        bar.update(task, completed=step)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()

    def _at(self, step: int) -> tuple["Progress", "TaskID"]:
        # Made at the first step, which a resumed run does not start at: the time left is reckoned from there.
        if self.bar is None or self.task is None:
            self.bar = _build_bar()
            self.task = self.bar.add_task("train", total=self.total_steps, completed=step, status="")
            self.bar.start()
        return self.bar, self.task


class TensorBoardSink:
    """Scalars in TensorBoard's event files."""

    refusals: ClassVar[tuple[type[Exception], ...]] = (Exception,)

    def __init__(self, folder: Path) -> None:
        module = optional_import("torch.utils.tensorboard", key="tensorboard_dir", install="pip install tensorboard")
        self._open = partial(module.SummaryWriter, log_dir=str(folder))
        try:
            self.writer: Any = self._open()
        except OSError as error:
            if is_mistake(error):
                raise ConfigError(f"cannot write {folder}: {error.strerror}; change tensorboard_dir") from error
            log.warning("%s: cannot be written (%s); tried again at the next report", folder, error.strerror)
            self.writer = None

    def log(self, step: int, metrics: Metrics) -> None:
        """Add one scalar a metric, to another file where the writer of the one before has died of an error."""
        writer, self.writer = self.writer or self._open(), None
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        self.writer = writer

    def progress(self, step: int) -> None:
        """Nothing to record."""

    def close(self) -> None:
        """Write what is buffered."""
        if self.writer is not None:
            self.writer.close()


def run_folder(config: "Config") -> Path:
    """The folder of a run's own files: `save`, else `log_dir`, else the current one."""
    return Path(config.checkpoint.save or config.logging.log_dir or ".")


def console_sinks(total_steps: int | None) -> Sequence[Sink]:
    """Choose a bar if stderr is a terminal, and lines on stdout if it is not or if stdout goes elsewhere."""
    output = results.stream()
    sinks: list[Sink] = [BarSink(total_steps)] if sys.stderr.isatty() else []
    if not (sys.stderr.isatty() and output.isatty()):
        sinks.append(LineSink(total_steps, output))
    elif isinstance(output, CopiedStream):
        sinks.append(LineSink(total_steps, cast(TextIO, output.copy)))
    return sinks


def console_lines(step: int, total_steps: int | None, metrics: Metrics) -> list[str]:
    """Upstream's console line if there are metrics of training, and one line for each evaluation.

    What a line has no metric for is left out; `train/` metrics beyond upstream's own come in the order given.
    """
    lines = [*_timer_lines(metrics), *evaluation_lines(step, metrics)]
    if not any(name.startswith(("train/", "runtime/")) for name in metrics):
        return lines
    named = {name for name, _, _ in (*_BEFORE_LOSS, *_AFTER_LOSS)} | {"runtime/samples_per_sec"}
    objective = [name for name in metrics if name.startswith("train/") and name not in named]
    total = "" if total_steps is None else f"/{total_steps:8d}"
    parts = [
        *_render((("runtime/samples_per_sec", "samples/sec: {:.3f}", 1),), metrics),
        f"iteration {step:8d}{total}",
        *_render(_BEFORE_LOSS, metrics),
        *(f"{name.removeprefix('train/')}: {metrics[name]:.6E}" for name in objective),
        *_render(_AFTER_LOSS, metrics),
    ]
    return ["".join(f" {part} |" for part in parts), *lines]


def evaluation_lines(step: int, metrics: Metrics) -> list[str]:
    """One line for the `validation/` metrics and one for the `test/` metrics, where there are any."""
    lines = []
    for split in ("validation", "test"):
        names = [name for name in metrics if name.startswith(f"{split}/")]
        if names:
            figures = "".join(f" {name.removeprefix(f'{split}/')}: {metrics[name]:.6E} |" for name in names)
            lines.append(f" {split} results at iteration {step} |{figures}")
    return lines


def _timer_lines(metrics: Metrics) -> list[str]:
    """Upstream's line of the phases of a step, where there are any."""
    phases = [f" | {name[7:]}: {1e3 * value:.2f}" for name, value in metrics.items() if name.startswith("timers/")]
    return [f"time (ms){''.join(phases)}"] if phases else []


# Metric, how it reads, and the factor that turns it into the unit shown.
_Part = tuple[str, str, float]
_BEFORE_LOSS: tuple[_Part, ...] = (
    ("runtime/iteration_time", "elapsed time per iteration (ms): {:.1f}", 1e3),
    ("train/learning_rate", "learning rate: {:.3E}", 1),
    ("runtime/flops_per_sec_per_gpu", "approx flops per GPU: {:.3g}TFLOPS", 1e-12),
    ("runtime/model_flops_utilization", "MFU: {:.1f}%", 100),
    ("runtime/hardware_flops_utilization", "HFU: {:.1f}%", 100),
)
_AFTER_LOSS: tuple[_Part, ...] = (
    ("train/loss_scale", "loss scale: {:.1f}", 1),
    ("train/skipped_iterations", "number of skipped iterations: {:3.0f}", 1),
    ("train/nan_iterations", "number of nan iterations: {:3.0f}", 1),
)
_BESIDE_BAR: tuple[_Part, ...] = (
    ("train/lm_loss", "loss {:.3f}", 1),
    ("train/learning_rate", "lr {:.2e}", 1),
    ("runtime/tokens_per_sec", "{:,.0f} tokens/s", 1),
    ("runtime/model_flops_utilization", "MFU {:.1f}%", 100),
)


def _render(parts: Iterable[_Part], metrics: Metrics) -> list[str]:
    return [text.format(metrics[name] * factor) for name, text, factor in parts if name in metrics]


def _build_bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[status]}"))
    return Progress(*columns, console=Console(file=beside_copy(sys.stderr)))


def _number(value: SupportsFloat) -> float:
    return value if isinstance(value, int) else float(value)
