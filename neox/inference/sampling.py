"""The next token from logits: greedy, temperature, top-k and top-p."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neox.errors import CheckpointError, ConfigError

SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny
"""Smallest that fp32 can divide by on every device; below it nothing but the likeliest token could be drawn."""

LARGEST_TEMPERATURE = 1e30
"""Above it fp32 sees no difference between tokens, and some devices no number to divide by."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token, whatever the other two say.
        top_k: draw among this many likeliest tokens; 0 is off.
        top_p: draw among the likeliest tokens that together reach this probability; 0 is off.

    Raises:
        ConfigError: a value that means nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: {self.temperature} is not a temperature; set 0 or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k: {self.top_k} is not a number of tokens; set 0 (off) or more")
        if not 0.0 <= self.top_p <= 1.0:
            raise ConfigError(f"top_p: {self.top_p} is not a probability; set 0 (off) to 1")

    @property
    def greedy(self) -> bool:
        """Whether chance plays no part."""
        return self.temperature < SMALLEST_TEMPERATURE


GREEDY = Sampling()


def filter_logits(logits_BV: torch.Tensor, *, top_k: int = 0, top_p: float = 0.0) -> torch.Tensor:
    """Set the logits of tokens that may not be drawn to -inf: top-k first, then top-p of what is left.

    Top-p (nucleus sampling, Holtzman et al. 2020) keeps the smallest set of likeliest tokens whose probability
    exceeds `top_p`, the token that crosses it included, so at least one. Ties at the k-th logit all stay.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        smallest_kept = logits_BV.topk(top_k, dim=-1).values[..., -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept, float("-inf"))
    if 0.0 < top_p < 1.0:
        descending, order = logits_BV.sort(dim=-1, descending=True)
        probabilities = descending.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        drop = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, before > top_p)
        logits_BV = logits_BV.masked_fill(drop, float("-inf"))
    return logits_BV


def draw_tokens(logits_BV: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Draw one token a row.

    Args:
        logits_BV: fp32 logits of the next token.
        sampling: how to draw.
        generators: one a row, so that what a row draws does not depend on the rows beside it.

    Returns:
        int64 ids [B].

    Raises:
        CheckpointError: a row of logits is not a number, or infinite, at its largest.
    """
    largest_B1 = logits_BV.amax(dim=-1, keepdim=True)
    if not largest_B1.isfinite().all():
        raise CheckpointError(
            "the model's logits are not finite, so no token can be chosen; its weights are damaged or its precision "
            "overflows: try precision=fp32, or inspect_checkpoint.py"
        )
    if sampling.greedy:
        return logits_BV.argmax(dim=-1)
    # The largest becomes 0: whatever the temperature, it stays finite.
    logits_BV = (logits_BV - largest_B1) / min(sampling.temperature, LARGEST_TEMPERATURE)
    logits_BV = filter_logits(logits_BV, top_k=sampling.top_k, top_p=sampling.top_p)
    probabilities = logits_BV.softmax(dim=-1)
    drawn = [torch.multinomial(row, 1, generator=own) for row, own in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn)
