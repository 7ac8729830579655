"""The learning rate, the batch size and the tokens of a run as a picture: in the terminal, or as PNG."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path

from neox.config.config import Config
from neox.config.learning_rate import LearningRate
from neox.config.ramp import BatchRamp
from neox.errors import ConfigError
from neox.files import write_whole

_COLUMNS, _ROWS = 64, 14
_MOST_STEPS = 10_000_000
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of the braille dots of a character, by column and by row from the top."""


@dataclass(frozen=True)
class Plan:
    """What each step of a run uses.

    Attributes:
        schedule: of the learning rate.
        rates: learning rate of each step.
        batches: sequences of each step; empty while the batch is not known.
        tokens: seen after each step; empty while the batch is not known.
        ramps: whether the batch grows.
    """

    schedule: LearningRate
    rates: list[float]
    batches: list[int]
    tokens: list[int]
    ramps: bool

    @classmethod
    def from_config(cls, config: Config) -> "Plan":
        """Follow a run to its end, `train_iters` or else `lr_decay_iters`.

        Raises:
            ConfigError: there is no optimizer, or neither key says how long the run is.
        """
        if not config.optimizer.is_given:
            raise ConfigError("optimizer: none is given, so there is no learning rate; add optimizer: {type: Adam}")
        schedule = LearningRate.from_config(config)
        steps = config.training.train_iters or schedule.horizon
        if steps > _MOST_STEPS:
            raise ConfigError(f"train_iters: {steps:,} iterations are too many to draw; give {_MOST_STEPS:,} at most")
        batches = _batches(config, steps)
        return cls(
            schedule=schedule,
            rates=[schedule.lr_at(step) for step in range(steps)],
            batches=batches,
            tokens=list(accumulate(size * config.model.seq_length for size in batches)),
            ramps=config.batch.rampup_batch_size is not None,
        )


def _batches(config: Config, steps: int) -> list[int]:
    full, ramp = config.batch.train_batch_size, BatchRamp.from_config(config)
    if not full:
        return []
    if ramp is None:
        return [full] * steps
    sizes: list[int] = []
    consumed = 0
    for _ in range(steps):
        sizes.append(ramp.size_at(consumed))
        consumed += sizes[-1]
    return sizes


def draw(config: Config) -> str:
    """The schedule as text for a terminal.

    Raises:
        ConfigError: see Plan.from_config.
    """
    plan = Plan.from_config(config)
    lines = [_title(plan), "", *_curve(plan.rates), _axis(plan)]
    if plan.ramps and plan.batches:
        lines += ["", "batch size, sequences", "", *_curve([float(size) for size in plan.batches]), _axis(plan)]
    if plan.tokens:
        middle = plan.tokens[(len(plan.tokens) - 1) // 2]
        remark = ", at the full sequence length" if config.training.curriculum_learning else ""
        lines += ["", f"tokens seen: {middle:,} half way, {plan.tokens[-1]:,} at the end{remark}"]
    return "\n".join(lines) + "\n"


def _title(plan: Plan) -> str:
    schedule, steps = plan.schedule, len(plan.rates)
    style = schedule.style
    if style == "wsd":
        style += f" (last {schedule.decay_fraction:.0%}: {schedule.decay_shape})"
    warmup = "" if schedule.params is not None else f"warmup {schedule.warmup:g} iterations, "
    return (
        f"learning rate: {style}, {warmup}peak {max(plan.rates, default=0.0):.3g}, "
        f"first {plan.rates[0]:.3g}, last {plan.rates[-1]:.3g}, {steps:,} iterations"
    )


def _axis(plan: Plan) -> str:
    last = f"{len(plan.rates):,}"
    return f"{'':>10} 1{last:>{_COLUMNS - 1}}"


def _curve(values: Sequence[float]) -> list[str]:
    """Rows of braille characters, the smallest value of the axis (0) at the bottom."""
    width, height = 2 * _COLUMNS, 4 * _ROWS
    top = max(values) or 1.0
    cells = [[0] * _COLUMNS for _ in range(_ROWS)]
    previous = None
    for x in range(width):
        value = values[round(x * (len(values) - 1) / (width - 1))]
        y = round(value / top * (height - 1))
        start = y if previous is None else previous
        for level in range(min(start, y), max(start, y) + 1):
            row = height - 1 - level
            cells[row // 4][x // 2] |= _DOTS[x % 2][row % 4]
        previous = y
    labels = {0: f"{top:.3g}", _ROWS // 2: f"{top / 2:.3g}", _ROWS - 1: "0"}
    return [
        f"{labels.get(number, ''):>9} │" + "".join(chr(0x2800 + cell) for cell in row)
        for number, row in enumerate(cells)
    ]


def save_png(config: Config, path: str | Path) -> None:
    """Draw the schedule into a PNG file.

    Raises:
        ConfigError: see Plan.from_config; or matplotlib is not installed.
        UserError: the file cannot be written.
    """
    plan = Plan.from_config(config)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--png needs matplotlib: pip install matplotlib") from error
    panels = 1 + bool(plan.ramps and plan.batches)
    figure = Figure(figsize=(8.0, 3.5 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
    steps = range(1, len(plan.rates) + 1)
    axes[0].plot(steps, plan.rates)
    axes[0].set(title=_title(plan), ylabel="learning rate", ylim=(0.0, None))
    axes[0].title.set_fontsize("small")
    if panels == 2:
        axes[1].plot(steps, plan.batches)
        axes[1].set(ylabel="batch size, sequences", ylim=(0, None))
    axes[-1].set_xlabel(f"iteration; {plan.tokens[-1]:,} tokens in all" if plan.tokens else "iteration")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_whole(Path(path), picture.getvalue())
