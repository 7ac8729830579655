"""Speed of training: samples, tokens and FLOPs per second, and their share of what the device can do."""

import re
from dataclasses import dataclass

from neox.model.flops import TokenFlops

# Dense TFLOP/s of bf16 (fp16 where a device has no bf16) with fp32 accumulation, from the makers' data
# sheets; matched against torch.cuda.get_device_name(), first match wins.
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    (r"GB200", 2500.0),
    (r"B200", 2250.0),
    (r"GH200", 989.0),
    (r"H200 NVL", 835.0),
    (r"H200", 989.0),
    (r"H100 NVL", 835.0),
    (r"H[18]00 PCIe", 756.0),
    (r"H[18]00", 989.0),
    (r"H20", 148.0),
    (r"A[18]00", 312.0),
    (r"A40", 149.7),
    (r"A30", 165.0),
    (r"A10G", 70.0),
    (r"A10", 125.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
    (r"V100.*PCIE", 112.0),
    (r"V100", 125.0),
    (r"T4", 65.0),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
    (r"MI325X", 1307.4),
    (r"MI300X", 1307.4),
    (r"MI250X", 191.5),  # one of the two dies, which torch sees as a device
)


def device_peak_tflops(device_name: str, *, precision: str) -> float | None:
    """Peak dense TFLOP/s of a device in 16-bit matrix products.

    Args:
        device_name: as from `torch.cuda.get_device_name()`.
        precision: "fp16" or "bfloat16"; anything else has no peak here, since fp32 runs on other units.

    Returns:
        None for an unknown device or precision: set `peak_theoretical_tflops` then.
    """
    if precision not in ("fp16", "bfloat16"):
        return None
    for pattern, peak in _PEAK_TFLOPS:
        if re.search(rf"\b{pattern}\b", device_name, flags=re.IGNORECASE):
            return peak
    return None


@dataclass(frozen=True)
class Throughput:
    """Speed of a stretch of training.

    Attributes:
        samples: sequences trained on, over all devices.
        tokens: tokens trained on, over all devices.
        steps: optimizer steps.
        seconds: wall time.
        devices: number of processes (GPUs).
        flops: FLOPs per token (`neox.model.flops`).
        checkpoint_activations: whether the blocks ran forward twice.
        peak_tflops: dense peak of one device, or None if unknown.
    """

    samples: int
    tokens: int
    steps: int
    seconds: float
    devices: int
    flops: TokenFlops
    checkpoint_activations: bool
    peak_tflops: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all devices."""
        return self.tokens / self.seconds

    @property
    def model_tflops(self) -> float:
        """TFLOP/s per device that the model needs, recomputation not counted."""
        return self.flops.model * self.tokens_per_second / self.devices / 1e12

    @property
    def hardware_tflops(self) -> float:
        """TFLOP/s per device as executed, recomputation counted."""
        per_token = self.flops.hardware(checkpoint_activations=self.checkpoint_activations)
        return per_token * self.tokens_per_second / self.devices / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization, 0 .. 1 (Chowdhery et al. 2022, appendix B); None without a peak."""
        return None if self.peak_tflops is None else self.model_tflops / self.peak_tflops

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs utilization, 0 .. 1; None without a peak."""
        return None if self.peak_tflops is None else self.hardware_tflops / self.peak_tflops

    def metrics(self) -> dict[str, float]:
        """Return the figures under upstream's metric names; the FLOP rate counts recomputation, as upstream's."""
        figures = {
            "runtime/samples_per_sec": self.samples / self.seconds,
            "runtime/iteration_time": self.seconds / self.steps,
            "runtime/steps_per_sec": self.steps / self.seconds,
            "runtime/tokens_per_sec": self.tokens_per_second,
            "runtime/flops_per_sec_per_gpu": self.hardware_tflops * 1e12,
        }
        if self.mfu is not None and self.hfu is not None:
            figures["runtime/model_flops_utilization"] = self.mfu
            figures["runtime/hardware_flops_utilization"] = self.hfu
        return figures
