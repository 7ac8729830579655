"""Where time and memory go: timers, torch's profiler, CUDA's memory history, DeepSpeed's communication log."""

from pathlib import Path

import torch

from neox.checkpoint.native.manifest import Progress
from neox.errors import ConfigError
from neox.training.engine import Engine
from neox.training.loop import Callback, Step
from neox.training.metrics.loggers import MetricLog, run_folder
from neox.training.metrics.timers import StepTimers


def profilers(engine: Engine, log: MetricLog, *, last_iteration: int) -> list[Callback]:
    """The callbacks that the configuration asks for."""
    settings, given = engine.config.logging, engine.config.deepspeed
    found: list[Callback] = []
    if (given.flops_profiler or {}).get("enabled") and engine.mesh.pipe_size > 1:
        # Before PhaseTimes, which takes what the timers measured.
        found.append(PipelineOperations(engine))
    if settings.wall_clock_breakdown:
        found.append(PhaseTimes(engine, log))
    if settings.profile:
        found.append(Trace(engine, last_iteration=last_iteration))
    if settings.memory_profiling and torch.cuda.is_available():
        found.append(MemoryHistory(engine, last_iteration=last_iteration))
    if (given.comms_logger or {}).get("enabled"):
        found.append(CommunicationSummary())
    return found


class PhaseTimes:
    """`timers/<phase>`: mean seconds of a step in each of its phases since the last report, on rank 0."""

    def __init__(self, engine: Engine, log: MetricLog) -> None:
        self.engine, self.log = engine, log
        self.since = 0

    def before_training(self, progress: Progress) -> None:
        """Forget what was timed while the engine was built."""
        self.since = progress.iteration
        self._take()

    def after_step(self, step: Step) -> None:
        """Report when due."""
        iteration = step.progress.iteration
        if step.is_last or iteration % self.engine.config.logging.log_interval == 0:
            steps, self.since = iteration - self.since, iteration
            self.log.log(iteration, {f"timers/{name}": seconds / steps for name, seconds in self._take().items()})

    def _take(self) -> dict[str, float]:
        timers = self.engine.deepspeed.timers
        assert isinstance(timers, StepTimers), "the engine was given them"
        return timers.take()


class Trace:
    """A torch.profiler trace of the iterations from profile_step_start to before profile_step_stop, of every rank.

    On a GPU the same stretch is a capture range for Nsight Systems (`--capture-range=cudaProfilerApi`).
    """

    def __init__(self, engine: Engine, *, last_iteration: int) -> None:
        settings = engine.config.logging
        self.first, self.last = settings.profile_step_start, min(settings.profile_step_stop - 1, last_iteration)
        self.mesh = engine.mesh
        self.folder = Path(settings.tensorboard_dir or run_folder(engine.config)) / "profile"
        self.profiler: torch.profiler.profile | None = None

    def before_training(self, progress: Progress) -> None:
        """Begin where the run does so within the stretch."""
        self._begin_before(progress.iteration + 1)

    def after_step(self, step: Step) -> None:
        """Begin or end when due."""
        if self.profiler is not None and (step.is_last or step.progress.iteration >= self.last):
            self._end()
        if not step.is_last:
            self._begin_before(step.progress.iteration + 1)

    def _begin_before(self, iteration: int) -> None:
        if self.profiler is None and self.first <= iteration <= self.last:
            if self.mesh.device.type == "cuda":
                torch.cuda.profiler.start()
            self.profiler = torch.profiler.profile(record_shapes=True, with_stack=True)
            self.profiler.start()

    def _end(self) -> None:
        assert self.profiler is not None, "the profiler runs"
        self.profiler.stop()
        if self.mesh.device.type == "cuda":
            torch.cuda.profiler.stop()
        make_folder(self.folder, key="tensorboard_dir, save or log_dir")
        self.profiler.export_chrome_trace(str(self.folder / f"rank{self.mesh.rank}.pt.trace.json"))
        self.profiler = None


class MemoryHistory:
    """A record of every allocation up to profile_step_stop, for https://pytorch.org/memory_viz; of every rank.

    Written early if memory runs out before.
    """

    def __init__(self, engine: Engine, *, last_iteration: int) -> None:
        settings = engine.config.logging
        folder = settings.memory_profiling_path
        self.path = Path(folder or run_folder(engine.config) / "memory") / f"rank{engine.mesh.rank}.pickle"
        self.last = min(settings.profile_step_stop - 1, last_iteration)
        self.on = False

    def before_training(self, progress: Progress) -> None:
        """Begin."""
        if progress.iteration < self.last:
            make_folder(self.path.parent, key="memory_profiling_path")
            torch.cuda.memory._record_memory_history(max_entries=100_000)
            # Only a build of torch with CUDA has it, or knows its type.
            torch._C._cuda_attach_out_of_memory_observer(lambda *_: self._write())  # type: ignore[attr-defined,unused-ignore]
            self.on = True

    def after_step(self, step: Step) -> None:
        """End when due."""
        if self.on and (step.is_last or step.progress.iteration >= self.last):
            self._write()
            torch.cuda.memory._record_memory_history(enabled=None)
            self.on = False

    def _write(self) -> None:
        torch.cuda.memory._dump_snapshot(str(self.path))


class CommunicationSummary:
    """DeepSpeed's table of what it communicated, printed at the end."""

    def before_training(self, progress: Progress) -> None:
        """Nothing to do."""

    def after_step(self, step: Step) -> None:
        """Print, once."""
        if step.is_last:
            import deepspeed.comm

            deepspeed.comm.log_summary()


class PipelineOperations:
    """DeepSpeed's count of operations under a pipeline, whose engine starts the profiler and never ends it."""

    def __init__(self, engine: Engine) -> None:
        self.deepspeed = engine.deepspeed
        self.step = engine.deepspeed.flops_profiler_profile_step()

    def before_training(self, progress: Progress) -> None:
        """Nothing to do."""

    def after_step(self, step: Step) -> None:
        """Write the table after the profiled step; steps are counted from the start of this process."""
        engine = self.deepspeed
        if engine.global_steps == self.step:
            engine.timers.log(list(engine.timers.timers))  # so that only the profiled step is in the latencies
        if engine.global_rank == 0 and engine.global_steps == self.step + 1:
            engine.flops_profiler.print_model_profile(
                profile_step=engine.global_steps,
                module_depth=engine.flops_profiler_module_depth(),
                top_modules=engine.flops_profiler_top_modules(),
                detailed=engine.flops_profiler_detailed(),
                output_file=engine.flops_profiler_output_file(),
            )
            engine.flops_profiler.end_profile()


def make_folder(folder: Path, *, key: str) -> None:
    """Make a folder for what a run writes.

    Raises:
        ConfigError: if it cannot be made, naming the `key` to change.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}; change {key}") from error
