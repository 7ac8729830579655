"""Fingerprints of tensors: 64 bits made on the device, equal where every bit is equal.

The elements are read as integers w_i and summed as w_i * m_i mod 2^64 with odd multipliers m_i, which the place in the
tensor decides. An element that changes adds a difference of less than 2^64 times an odd number, which is never 0
mod 2^64: whatever happens to one element, one flipped bit say, is always seen. Changes of several elements cancel with
a chance of about 2^-32 or less. Sums of parts that know their place in a whole are the whole's fingerprint.
"""

import hashlib
from functools import lru_cache
from random import Random

import torch

_BLOCK = 1 << 14
"""Elements with multipliers of their own; those of the next block are the same times another odd number."""

_AT_ONCE = 1 << 22
"""Elements that are widened to 64 bits at a time."""

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROUND = 1 << 64


def fingerprint(values: torch.Tensor, *, start: int = 0) -> torch.Tensor:
    """Fingerprint of a tensor, int64 scalar on its device; nothing waits for the device.

    Args:
        values: any shape and dtype.
        start: place of the first element in the whole that they are a part of.
    """
    words = values.detach().contiguous().view(-1).view(_WORDS[values.element_size()])
    size, device = words.numel(), words.device
    multipliers = _multipliers(device)
    factors = _factors(device, _power_of_two((start + size) // _BLOCK + 1))
    total = torch.zeros((), dtype=torch.int64, device=device)
    done = 0
    while done < size:
        block, inside = divmod(start + done, _BLOCK)
        if inside or size - done < _BLOCK:
            taken = min(_BLOCK - inside, size - done)
            total += (words[done : done + taken] * multipliers[inside : inside + taken]).sum() * factors[block]
        else:
            blocks = min(size - done, _AT_ONCE) // _BLOCK
            taken = blocks * _BLOCK
            sums = (words[done : done + taken].view(blocks, _BLOCK) * multipliers).sum(dim=1)
            total += (sums * factors[block : block + blocks]).sum()
        done += taken
    return total


def odd_number(text: str) -> int:
    """An odd number that a text decides, as a signed integer of 64 bits."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
    return number | 1


def wrapped(number: int) -> int:
    """A whole number mod 2^64, as torch's int64 has it."""
    return (number + _ROUND // 2) % _ROUND - _ROUND // 2


@lru_cache(maxsize=4)
def _multipliers(device: torch.device) -> torch.Tensor:
    return _odd_numbers(_BLOCK, seed=1).to(device)


@lru_cache(maxsize=8)
def _factors(device: torch.device, blocks: int) -> torch.Tensor:
    return _odd_numbers(blocks, seed=2).to(device)


def _odd_numbers(count: int, *, seed: int) -> torch.Tensor:
    """Odd numbers of 64 bits; a longer list begins with a shorter one."""
    return torch.frombuffer(bytearray(Random(seed).randbytes(8 * count)), dtype=torch.int64) | 1


def _power_of_two(number: int) -> int:
    """The next power of two, so that tables are made for few lengths."""
    return 1 << (number - 1).bit_length()
