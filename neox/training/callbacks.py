"""What happens beside training: metrics, evaluation, checkpoints, an early end."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping

import torch

from neox.checkpoint.native.manifest import Progress
from neox.config import Config, ModelConfig
from neox.errors import UserError
from neox.model.flops import TokenFlops, flops_per_token
from neox.parallel.mesh import Mesh
from neox.training.engine import Engine
from neox.training.loop import Step
from neox.training.metrics.loggers import MetricLog
from neox.training.metrics.throughput import Throughput, device_peak_tflops
from neox.training.saving import Saver, is_save_point
from neox.training.schedule import LRSchedule
from neox.training.validation import Evaluator, evaluations_before


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
        self.losses: list[torch.Tensor] = []
        self.figures: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self.samples: Counter[int] = Counter()
        self.skipped = 0
        self.since = time.perf_counter()

    def before_training(self, progress: Progress) -> None:
        """Start the clock."""
        self.since = time.perf_counter()
        self.log.progress(progress.iteration)

    def after_step(self, step: Step) -> None:
        """Keep the loss; report when due."""
        self.losses.append(step.loss)
        for name, value in step.figures.items():
            self.figures[name].append(value)
        self.samples[step.length] += step.samples
        self.skipped += step.skipped
        iteration = step.progress.iteration
        if iteration % self.config.logging.log_interval and not step.is_last:
            self.log.progress(iteration)
            return
        self.log.log(iteration, self._report(step))
        self.log.progress(iteration)
        self.losses, self.skipped, self.since = [], 0, time.perf_counter()
        self.samples.clear()
        self.figures.clear()

    def _report(self, step: Step) -> dict[str, float]:
        losses = torch.stack(self.losses)
        loss = float(losses.mean())
        figures = {
            "train/lm_loss": loss,
            "train/learning_rate": step.learning_rate,
            "train/skipped_iterations": self.skipped,
        }
        figures |= {f"train/{name}": float(torch.stack(values).mean()) for name, values in self.figures.items()}
        figures["train/nan_iterations"] = int(losses.isnan().sum())
        if self.config.batch.rampup_batch_size is not None:
            figures["train/batch_size"] = step.samples
        if (self.config.training.curriculum_learning or {}).get("enabled"):
            figures["curriculum_seqlen"] = step.length
        if step.gradient_norm is not None:
            figures["train/grad_norm"] = float(step.gradient_norm)
        if self.config.model.precision == "fp16":
            figures["train/loss_scale"] = float(self.engine.loss_scale or 0.0)
        elif math.isnan(loss):
            raise UserError(
                f"iteration {step.progress.iteration}: the loss is not a number; resume from the last checkpoint "
                "with a lower learning rate or a smaller gradient_clipping"
            )
        return figures | self._speed().metrics()

    def _speed(self) -> Throughput:
        return Throughput(
            samples=self.samples.total(),
            tokens=sum(samples * length for length, samples in self.samples.items()),
            steps=len(self.losses),
            seconds=time.perf_counter() - self.since,
            devices=self.mesh.world_size,
            flops=mean_flops(self.config.model, self.samples),
            checkpoint_activations=self.config.training.checkpoint_activations,
            peak_tflops=self.peak,
        )


def mean_flops(model: ModelConfig, samples: Mapping[int, int]) -> TokenFlops:
    """FLOPs per token over samples of several lengths.

    Attention counts as full, the definition of most published figures (Chowdhery et al. 2022; Narayanan et al. 2021).

    Args:
        model: the shapes.
        samples: number of samples by their length in tokens.
    """
    tokens = sum(length * count for length, count in samples.items())
    blocks, head = 0.0, 0.0
    for length, count in samples.items():
        flops = flops_per_token(model.model_copy(update={"seq_length": length}), causal=False)
        blocks, head = blocks + flops.blocks * length * count / tokens, flops.head
    return TokenFlops(blocks=blocks, head=head)


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
            figures = self.evaluator.run(evaluations_before(config, iteration))
            self.log.log(iteration, {f"validation/{name}": value for name, value in figures.items()})


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
        if is_save_point(self.config, iteration) or (step.is_last and self.config.checkpoint.save is not None):
            self.saver.save(step.progress)
        elif iteration % self.config.logging.log_interval == 0:
            self.saver.look()
        if step.is_last:
            self.saver.finish()
