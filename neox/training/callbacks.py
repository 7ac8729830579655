"""What happens beside training: metrics, evaluation, checkpoints, an early end."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch

from neox.checkpoint.native.manifest import Progress
from neox.config import Config, ModelConfig
from neox.model.flops import TokenFlops, flops_per_token
from neox.parallel.mesh import Mesh
from neox.training.engine import Engine
from neox.training.loop import Step
from neox.training.metrics.loggers import MetricLog
from neox.training.metrics.throughput import Throughput, device_peak_tflops
from neox.training.saving import Saver, is_save_point, is_saved_after
from neox.training.schedule import LRSchedule
from neox.training.team import tell
from neox.training.validation import Evaluator, evaluations_before
from neox.watch import at_step


class SignsOfLife:
    """Tells the watch how far the run has come."""

    def before_training(self, progress: Progress) -> None:
        """Nothing to do: the first step, in which kernels are compiled, still belongs to the start."""

    def after_step(self, step: Step) -> None:
        """Every further step must end in time."""
        at_step(step.progress.iteration, is_last=step.is_last)


class Metrics:
    """Loss, learning rate, gradient norm and speed, every `log_interval` steps.

    Losses stay on the device until then, so that a step never waits for one.
    """

    def __init__(self, engine: Engine, log: MetricLog) -> None:
        self.engine = engine
        self.config = config = engine.config
        self.mesh = mesh = engine.mesh
        self.log = log
        self.peak = config.logging.peak_theoretical_tflops or _device_peak(config, mesh)
        self.has_warned_of_empty = False
        self.rows = 2 if config.comparison.is_pairwise else 1  # of a sample, which may be a pair
        self._restart()

    def _restart(self) -> None:
        """Begin the time between two reports."""
        self.losses: list[torch.Tensor] = []
        self.tokens: list[torch.Tensor] = []
        self.figures: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self.samples: Counter[int] = Counter()
        self.updated: list[int] = []
        self.since = time.perf_counter()

    def before_training(self, progress: Progress) -> None:
        """Start the clock."""
        self._restart()
        self.log.progress(progress.iteration)

    def after_step(self, step: Step) -> None:
        """Keep the loss; report when due."""
        if not step.skipped:
            self.updated.append(len(self.losses))
        self.losses.append(step.loss)
        self.tokens.append(step.tokens)
        for name, value in step.figures.items():
            self.figures[name].append(value)
        self.samples[step.length] += step.samples
        iteration = step.progress.iteration
        if iteration % self.config.logging.log_interval and not step.is_last:
            self.log.progress(iteration)
            return
        self.log.log(iteration, self._report(step))
        self.log.progress(iteration)
        self._restart()

    def _report(self, step: Step) -> dict[str, float]:
        tokens = torch.stack(self.tokens).tolist()
        self._warn_of_empty_steps(tokens)
        # Means are over the steps that updated the weights, or all where none did; with a token to learn.
        counted = [number for number in self.updated or range(len(tokens)) if tokens[number] > 0]
        figures = {"train/lm_loss": _mean(self.losses, counted)} if counted else {}
        figures["train/learning_rate"] = step.learning_rate
        figures["train/skipped_iterations"] = len(self.losses) - len(self.updated)
        if counted:
            figures |= {f"train/{name}": _mean(values, counted) for name, values in self.figures.items()}
        figures["train/nan_iterations"] = int(torch.stack(self.losses).isnan().sum())
        if self.config.batch.rampup_batch_size is not None:
            figures["train/batch_size"] = step.samples
        if (self.config.training.curriculum_learning or {}).get("enabled"):
            figures["curriculum_seqlen"] = step.length
        if step.gradient_norm is not None:
            figures["train/grad_norm"] = float(step.gradient_norm)
        if self.config.model.precision == "fp16":
            figures["train/loss_scale"] = float(self.engine.loss_scale or 0.0)
        return figures | self._speed().metrics()

    def _warn_of_empty_steps(self, tokens: list[float]) -> None:
        """Say once that there are steps without a labelled token."""
        empty = tokens.count(0.0)
        if empty and not self.has_warned_of_empty:
            self.has_warned_of_empty = True
            tell(
                self.mesh,
                f"no labelled token in {empty} of the last {len(tokens)} steps: nothing is learnt from them, and no "
                "mean counts them; check the labels of the training data",
            )

    def _speed(self) -> Throughput:
        return Throughput(
            samples=self.samples.total(),
            tokens=self.rows * sum(samples * length for length, samples in self.samples.items()),
            steps=len(self.losses),
            seconds=time.perf_counter() - self.since,
            devices=self.mesh.world_size,
            flops=mean_flops(self.config.model, self.samples, frozen=self.config.lora.is_on),
            checkpoint_activations=self.config.training.checkpoint_activations,
            peak_tflops=self.peak,
        )


def _mean(values: list[torch.Tensor], steps: list[int]) -> float:
    return float(torch.stack([values[step] for step in steps]).mean())


def mean_flops(model: ModelConfig, samples: Mapping[int, int], *, frozen: bool = False) -> TokenFlops:
    """FLOPs per token over samples of several lengths.

    Attention counts as full, the definition of most published figures (Chowdhery et al. 2022; Narayanan et al. 2021).

    Args:
        model: the shapes.
        samples: number of samples by their length in tokens.
        frozen: see `flops_per_token`.
    """
    tokens = sum(length * count for length, count in samples.items())
    blocks, head, still = 0.0, 0.0, 0.0
    for length, count in samples.items():
        flops = flops_per_token(model.model_copy(update={"seq_length": length}), causal=False, frozen=frozen)
        blocks, head, still = blocks + flops.blocks * length * count / tokens, flops.head, flops.frozen
    return TokenFlops(blocks=blocks, head=head, frozen=still)


def _device_peak(config: Config, mesh: Mesh) -> float | None:
    if mesh.device.type != "cuda":
        return None
    return device_peak_tflops(torch.cuda.get_device_name(mesh.device), precision=config.model.precision)


class Evaluation:
    """Loss on the validation data every `eval_interval` steps."""

    def __init__(self, evaluator: Evaluator, log: MetricLog) -> None:
        self.evaluator = evaluator
        self.log = log

    def before_training(self, progress: Progress) -> None:
        """Nothing to do."""

    def after_step(self, step: Step) -> None:
        """Evaluate when due."""
        config, iteration = self.evaluator.engine.config, step.progress.iteration
        if iteration % config.training.eval_interval == 0:
            self.evaluator.report(self.log, iteration, evaluations_before(config, iteration))


class Checkpoints:
    """Saves when the configuration says so, and at the end."""

    def __init__(self, engine: Engine, schedule: LRSchedule, *, last_iteration: int) -> None:
        self.config = engine.config
        self.saver = Saver(engine, schedule)
        self.last_iteration = last_iteration

    def before_training(self, progress: Progress) -> None:
        """`extra_save_iters: [0]` saves the initial weights."""
        if progress.iteration == 0 and is_save_point(self.config, 0):
            self.saver.save(progress)
        if progress.iteration == self.last_iteration:
            self.saver.finish()

    def after_step(self, step: Step) -> None:
        """Save when due, and where this process ends the run; there nothing is left in the background."""
        iteration = step.progress.iteration
        if is_saved_after(self.config, iteration, is_last=step.is_last):
            self.saver.save(step.progress)
        elif iteration % self.config.logging.log_interval == 0:
            self.saver.look()
        if step.is_last:
            self.saver.finish()
