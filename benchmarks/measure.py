"""Timing in interleaved rounds, the rate of plain matrix products, and the table of results."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from neox.model.flops import TokenFlops

PACKAGES = ("torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class Timing:
    """Seconds of each timed run of one thing."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """The shortest."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Product:
    """A plain matrix product [m, k] x [k, n]."""

    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.k * self.n

    def __str__(self) -> str:
        return f"{self.m} x {self.k} x {self.n}"

    def runner(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
        """Do it once, into memory that is already there."""
        left = torch.randn(self.m, self.k, device=device, dtype=dtype)
        right = torch.randn(self.k, self.n, device=device, dtype=dtype)
        out = torch.empty(self.m, self.n, device=device, dtype=dtype)

        def run() -> None:
            torch.mm(left, right, out=out)

        return run


def synchronize(device: torch.device) -> None:
    """Wait for what was started on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    runs: Mapping[str, Callable[[], object]], *, device: torch.device, rounds: int, warmup: int
) -> dict[str, Timing]:
    """Time each run once a round, A B C A B C, so that what else the machine does falls on all alike.

    Args:
        runs: what to time, by name; each is waited for.
        device: where it computes.
        rounds: timed rounds.
        warmup: rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


@dataclass(frozen=True)
class Speed:
    """A training step's speed.

    Attributes:
        tokens: tokens of a step.
        timing: seconds of the steps.
        causal, full: FLOPs of a token, with the keys a causal query sees and with all of them.
        limit: FLOP/s of the plain matrix product beside it.
    """

    tokens: int
    timing: Timing
    causal: TokenFlops
    full: TokenFlops
    limit: float

    @property
    def tokens_per_second(self) -> float:
        """By the median step."""
        return self.tokens / self.timing.median

    @property
    def best_tokens_per_second(self) -> float:
        """By the shortest step."""
        return self.tokens / self.timing.best

    def share(self, flops: TokenFlops, peak: float | None = None) -> float:
        """Model FLOP/s of the shortest step over `peak` (FLOP/s; default: the limit)."""
        return flops.model * self.best_tokens_per_second / (peak or self.limit)

    def row(self, *, peer: "Speed | None") -> dict[str, float | None]:
        """The figures of the table; ratios to `peer` above 1 mean faster than it."""
        return {
            "tokens/s (median)": self.tokens_per_second,
            "tokens/s (best)": self.best_tokens_per_second,
            "x peer (median)": self.tokens_per_second / peer.tokens_per_second if peer else None,
            "x peer (best)": self.best_tokens_per_second / peer.best_tokens_per_second if peer else None,
            "% of GEMM, causal": 100 * self.share(self.causal),
            "% of GEMM, full": 100 * self.share(self.full),
        }


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with equal keys as a Markdown table; None is an empty cell."""
    header = list(rows[0])
    cells = [header, *([_cell(row[name]) for name in header] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    facts: dict[str, object] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {name: version(name) for name in PACKAGES}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def free_memory(device: torch.device) -> None:
    """Give back what is no longer used, and start counting the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
