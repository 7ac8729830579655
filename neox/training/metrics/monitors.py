"""What can be watched of every parameter: gradients, weights and optimizer state; and the gradient noise scale.

Metric names are upstream's: `gradient_norms/<parameter>`, `pct_grad_zeros/<parameter>`, `parameter_norms/<parameter>`,
`optimizer_state_norms/<parameter>_<state>`, `train/noise_scale`. Figures are of whole logical tensors, whatever the
layout, and rank 0 has those of all pipeline stages.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from neox.checkpoint.native.manifest import Progress
from neox.config import Config
from neox.training.engine import Engine
from neox.training.loop import Callback, Step
from neox.training.metrics.expert_load import ExpertLoad
from neox.training.metrics.loggers import MetricLog
from neox.training.state import (
    local_state,
    local_weights,
    moment_names,
    moments_of,
    plain_moments,
    without_tied_copy,
)


def monitors(engine: Engine, log: MetricLog, *, last_iteration: int) -> list[Callback]:
    """The callbacks that the configuration asks for."""
    settings = engine.config.logging
    found: list[Callback] = []
    gradients = settings.log_grad_norm or settings.log_grad_pct_zeros
    if gradients or settings.log_param_norm or settings.log_optimizer_states:
        found.append(ParameterFigures(engine, log, last_iteration=last_iteration))
    if settings.log_gradient_noise_scale:
        found.append(GradientNoiseScale(engine, log, last_iteration=last_iteration))
    if engine.config.model.has_experts:
        found.append(ExpertLoad(engine, log))
    return found


def is_report(config: Config, iteration: int, last_iteration: int) -> bool:
    """Whether metrics are due after this iteration."""
    return iteration % config.logging.log_interval == 0 or iteration == last_iteration


def local_gradient(engine: Engine, parameter: nn.Parameter) -> torch.Tensor:
    """This tensor rank's share of a complete gradient, fp32, before clipping and without the loss scale.

    A collective over the data-parallel ranks at ZeRO 1 and above; valid between the last backward pass of a step and
    its update.
    """
    if engine.config.parallel.zero_stage == 0:
        assert parameter.grad is not None, "gradients are complete"
        return parameter.grad
    from deepspeed.utils import safe_get_full_grad

    gradient: torch.Tensor = safe_get_full_grad(parameter).float()
    return gradient if engine.loss_scale is None else gradient / engine.loss_scale


class LogicalSums:
    """Adds up what ranks know of logical tensors, each part once, so that every rank has the sums of all stages."""

    def __init__(self, engine: Engine) -> None:
        self.device = engine.mesh.device
        self.own = without_tied_copy(engine)
        mesh = engine.mesh
        self.counted = {
            name
            for name, p in self.own.items()
            if mesh.data_rank == 0 and (p.tensor_model_parallel or mesh.tensor_rank == 0)  # type: ignore[attr-defined]
        }
        self.place = {name: place for place, name in enumerate(over_all_ranks(list(self.own)))}

    def add(self, parts: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Sum of the scalars of all ranks, by parameter; waits for the device.

        Args:
            parts: this rank's share of each parameter of its stage, scalars on its device.
        """
        sums = torch.full((len(self.place),), 0.0, dtype=torch.float64, device=self.device)
        seen = torch.zeros_like(sums)
        counted = [name for name in parts if name in self.counted]
        if counted:
            places = torch.tensor([self.place[name] for name in counted], device=self.device)
            sums[places] = torch.stack([parts[name].to(self.device) for name in counted]).double()
            seen[places] = 1.0
        both = torch.stack((sums, seen))
        dist.all_reduce(both)
        totals, found = both.tolist()
        return {name: totals[place] for name, place in self.place.items() if found[place] > 0}


def over_all_ranks(names: list[str]) -> list[str]:
    """The names that any rank has, in the same order on each: pipeline stages differ."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, names)
    return list(dict.fromkeys(name for names_of_rank in found for name in names_of_rank))


class ParameterFigures:
    """Norms of gradients, weights and optimizer state, and zeros in gradients, every `log_interval` steps.

    Between reports it costs nothing.
    """

    def __init__(self, engine: Engine, log: MetricLog, *, last_iteration: int) -> None:
        self.engine, self.log, self.last_iteration = engine, log, last_iteration
        self.settings = engine.config.logging
        self.sums = LogicalSums(engine)
        self.iteration = 0
        self.figures: dict[str, float] = {}
        if self.settings.log_grad_norm or self.settings.log_grad_pct_zeros:
            engine.watch_gradients(self._gradients)

    def before_training(self, progress: Progress) -> None:
        """Take note of where the run stands."""
        self.iteration = progress.iteration

    def after_step(self, step: Step) -> None:
        """Report when due."""
        self.iteration = step.progress.iteration
        if not is_report(self.engine.config, self.iteration, self.last_iteration):
            return
        if self.settings.log_param_norm:
            self._norms("parameter_norms", lambda p: local_weights(self.engine, p))
        if self.settings.log_optimizer_states:
            with plain_moments(self.engine):
                for state in over_all_ranks(moment_names(self.engine)):
                    self._state_norms(state)
        self.log.log(self.iteration, self.figures)
        self.figures = {}

    def _gradients(self) -> None:
        if not is_report(self.engine.config, self.iteration + 1, self.last_iteration):
            return
        squares, zeros = {}, {}
        for name, parameter in self._trained():
            gradient = local_gradient(self.engine, parameter)
            squares[name] = _square(gradient)
            zeros[name] = self._share_of_zeros(gradient, parameter)
        if self.settings.log_grad_norm:
            self._record("gradient_norms", {name: s**0.5 for name, s in self.sums.add(squares).items()})
        if self.settings.log_grad_pct_zeros:
            self._record("pct_grad_zeros", {name: 100 * share for name, share in self.sums.add(zeros).items()})

    def _share_of_zeros(self, gradient: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Zeros of this rank over the elements of the whole; padding rows of the vocabulary do not count."""
        mesh = self.engine.mesh
        whole = parameter.whole_shape.numel()  # type: ignore[attr-defined]
        padding = 0
        if parameter.tensor_model_parallel and mesh.tensor_rank == 0:  # type: ignore[attr-defined]
            padding = gradient.numel() * mesh.tensor_size - whole
        return ((gradient == 0).sum() - padding) / whole

    def _state_norms(self, state: str) -> None:
        trained = {name: p for name, p in self._trained() if state in moments_of(self.engine, name)}
        squares = {name: _square(local_state(self.engine, p, state)) for name, p in trained.items()}
        norms = {f"{name}_{state}": s**0.5 for name, s in self.sums.add(squares).items()}
        self._record("optimizer_state_norms", norms)

    def _norms(self, family: str, tensor_of: Callable[[nn.Parameter], torch.Tensor]) -> None:
        squares = {name: _square(tensor_of(p)) for name, p in self.sums.own.items()}
        self._record(family, {name: s**0.5 for name, s in self.sums.add(squares).items()})

    def _record(self, family: str, values: Mapping[str, float]) -> None:
        self.figures |= {f"{family}/{name}": value for name, value in values.items()}

    def _trained(self) -> Iterable[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.sums.own.items() if p.requires_grad)


class GradientNoiseScale:
    """The batch size, in sequences, where doubling it stops being worth while (McCandlish et al. 2018, section 2.2).

    The small batch is a step's, the large one that of `gradient_noise_scale_n_batches` steps in a row, whose gradients
    are summed: the weights are taken to move little in between. Appendix A.1 of the paper turns the two square norms
    into unbiased estimates of |G|^2 and tr(Sigma), which are averaged over time, each by itself.

    Each data-parallel rank keeps its share of that sum, fp32. At ZeRO 1 and above every step gathers the gradients once
    more.
    """

    def __init__(self, engine: Engine, log: MetricLog, *, last_iteration: int) -> None:
        self.engine, self.log, self.last_iteration = engine, log, last_iteration
        settings = engine.config.logging
        self.steps = settings.gradient_noise_scale_n_batches
        self.device = torch.device("cpu") if settings.gradient_noise_scale_cpu_offload else engine.mesh.device
        self.average = NoiseAverage()
        self.windows: list[tuple[torch.Tensor, float, float]] = []
        self._restart()
        engine.watch_gradients(self._add)

    def before_training(self, progress: Progress) -> None:
        """Begin a window."""
        self._restart()

    def after_step(self, step: Step) -> None:
        """Close a window that is full; report when due."""
        self.inverse_sizes.append(1.0 / step.samples)
        if step.skipped:
            self._restart()  # what was left out is no gradient
        elif len(self.inverse_sizes) == self.steps:
            self._close()
        if is_report(self.engine.config, step.progress.iteration, self.last_iteration):
            self._report(step.progress.iteration)

    def _restart(self) -> None:
        self.sum: torch.Tensor | None = None
        self.small = torch.zeros((), device=self.device)
        self.inverse_sizes: list[float] = []

    def _add(self) -> None:
        """Take in a step's gradient: this rank's share of every parameter it counts."""
        mesh = self.engine.mesh
        shares = []
        for parameter in without_tied_copy(self.engine).values():
            if parameter.requires_grad:
                gradient = local_gradient(self.engine, parameter)
                if parameter.tensor_model_parallel or mesh.tensor_rank == 0:  # type: ignore[attr-defined]
                    shares.append(gradient.flatten().tensor_split(mesh.data_size)[mesh.data_rank])
        share = torch.cat(shares).to(self.device, torch.float32) if shares else torch.zeros(1, device=self.device)
        self.small += _square(share)
        self.sum = share.clone() if self.sum is None else self.sum.add_(share)

    def _close(self) -> None:
        assert self.sum is not None, "a full window has gradients"
        squares = torch.stack((self.small / self.steps, _square(self.sum / self.steps)))
        inverse_small = sum(self.inverse_sizes) / self.steps
        self.windows.append((squares, inverse_small, inverse_small / self.steps))
        self._restart()

    def _report(self, iteration: int) -> None:
        if not self.windows:
            return
        squares = torch.stack([window[0] for window in self.windows]).to(self.engine.mesh.device)
        dist.all_reduce(squares)
        for (small, big), (_, inverse_small, inverse_big) in zip(squares.tolist(), self.windows, strict=True):
            self.average.add(small, big, inverse_small=inverse_small, inverse_big=inverse_big)
        self.windows = []
        if self.average.scale is not None:
            self.log.log(iteration, {"train/noise_scale": self.average.scale})


class NoiseAverage:
    """Running averages of |G|^2 and tr(Sigma); their ratio is the simple noise scale.

    E|g_B|^2 = |G|^2 + tr(Sigma) / B for the gradient of a batch of B (McCandlish et al. 2018, appendix A.1), so two
    batch sizes give two equations.
    """

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay
        self.signal = 0.0
        self.noise = 0.0

    def add(self, small: float, big: float, *, inverse_small: float, inverse_big: float) -> None:
        """Take in the square norms of gradients of two batch sizes, given by 1 / B."""
        noise = (small - big) / (inverse_small - inverse_big)
        signal = small - noise * inverse_small
        self.noise = self.decay * self.noise + (1.0 - self.decay) * noise
        self.signal = self.decay * self.signal + (1.0 - self.decay) * signal

    @property
    def scale(self) -> float | None:
        """Sequences; None as long as noise drowns the signal, which makes the estimate of |G|^2 negative."""
        return self.noise / self.signal if self.signal > 0.0 else None


def _square(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float32).square()
