"""AdamW with 8-bit moments (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization")."""

from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_blockwise

_MOMENTS = (("exp_avg", "state1", "qmap1", "absmax1"), ("exp_avg_sq", "state2", "qmap2", "absmax2"))
_BLOCK = 256
"""Elements with one scale, bitsandbytes' own choice."""


class Adam8bit(bnb.optim.Adam8bit):  # type: ignore[misc]
    """bitsandbytes' optimizer, whose moments can be turned into AdamW's for a checkpoint and back."""

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float] | list[float], eps: float
    ) -> None:
        """Take parameter groups with `weight_decay`; tensors below 4096 elements keep fp32 moments."""
        super().__init__(groups, lr=lr, betas=tuple(betas), eps=eps)

    def unpack(self) -> None:
        """Replace every 8-bit state by fp32 moments under AdamW's names."""
        for state in self.state.values():
            for name, packed, levels, scales in _MOMENTS:
                if packed not in state:
                    continue
                value = state.pop(packed)
                if value.dtype == torch.uint8:
                    value = dequantize_blockwise(
                        value, absmax=state.pop(scales), code=state.pop(levels), blocksize=_BLOCK
                    )
                state[name] = value.float()

    @torch.no_grad()
    def pack(self) -> None:
        """Undo `unpack`: moments that came from it, cut into the same blocks, get the very same values."""
        for index, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                unpacked = self.state.get(parameter, {})
                if "exp_avg" not in unpacked:
                    continue
                self.state[parameter] = {}
                self.init_state(group, parameter, index, place)
                state = self.state[parameter]
                state["step"] = int(unpacked["step"])
                for name, packed, levels, scales in _MOMENTS:
                    if state[packed].dtype == torch.uint8:
                        codes, scale = quantize(unpacked[name], state[levels])
                        state[packed].copy_(codes)
                        state[scales].copy_(scale)
                    else:
                        state[packed].copy_(unpacked[name])


def quantize(values: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find 8-bit codes and scales of blocks, such that level x scale is nearest to the value.

    The levels end at 1, and below zero before -1, so the scale of a block whose largest element is negative is that
    element over the lowest level. The quotient can miss the scale that it was made with by a rounding; of the
    neighbours the one that gives back most elements exactly is taken.

    Args:
        values: fp32, any shape.
        levels: fp32 [256], ascending.

    Returns:
        Codes, uint8 in the shape of `values`, and scales, fp32, one a block of 256.
    """
    missing = -values.numel() % _BLOCK
    blocks = torch.nn.functional.pad(values.reshape(-1), (0, missing)).view(-1, _BLOCK)
    highest, lowest = blocks.amax(dim=1), -blocks.amin(dim=1)
    is_negative = (lowest >= highest) & (lowest > 0)
    guess = torch.where(is_negative, lowest / levels[0].abs().clamp(min=0.5), highest)
    between = (levels[1:] + levels[:-1]) / 2
    best_codes, best_scale = torch.zeros_like(blocks, dtype=torch.int64), guess
    fewest = torch.full_like(guess, _BLOCK + 1)
    for scale in (guess, guess.nextafter(guess + 1), guess.nextafter(guess - 1)):
        codes = torch.bucketize(blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1), between)
        wrong = (levels[codes] * scale.unsqueeze(1) != blocks).sum(dim=1)
        is_better = wrong < fewest
        best_codes = torch.where(is_better.unsqueeze(1), codes, best_codes)
        best_scale, fewest = torch.where(is_better, scale, best_scale), torch.minimum(wrong, fewest)
    return best_codes.view(-1)[: values.numel()].view(values.shape).to(torch.uint8), best_scale
