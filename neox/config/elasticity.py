"""DeepSpeed's elastic batch sizes: one global batch that many numbers of processes can share.

DeepSpeed 0.19.8 has dropped the section; its rule, as the releases before it had it, is the arithmetic below.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MANY_DIVISORS = (
    *(1, 2, 4, 6, 12, 24, 36, 48, 60, 120, 180, 240, 360, 720, 840, 1260, 1680, 2520, 5040, 7560, 10080, 15120),
    *(20160, 25200, 27720, 45360, 50400, 55440, 83160, 110880, 166320, 221760, 277200, 332640, 498960, 554400),
    *(665280, 720720),
)
"""The highly composite numbers that DeepSpeed scales a batch by."""


@dataclass(frozen=True)
class ElasticBatch:
    """What a run may use.

    Attributes:
        total: sequences of one step.
        ranks: data-parallel sizes that the total can be divided over.
    """

    total: int
    ranks: tuple[int, ...]

    def micro_batch(self, ranks: int, micro_batches: Iterable[int]) -> int | None:
        """The largest micro batch that divides a rank's share; None if none does."""
        share = self.total // ranks
        return next((size for size in sorted(micro_batches, reverse=True) if share and share % size == 0), None)


@dataclass(frozen=True)
class Elasticity:
    """The section, complete.

    Attributes:
        largest: most sequences of one step.
        micro_batches: sequences of one forward pass on one rank that fit in memory.
        least, most: bounds of the number of ranks; in version 0.2 of the number of processes.
        prefers_larger: whether of two totals with as many divisors the larger is taken.
        per_node: processes of a host, for version 0.2.
        replica: processes that hold one copy of the model, for version 0.2.
        by_node: version 0.2, which counts whole hosts.
    """

    largest: int
    micro_batches: tuple[int, ...]
    least: int
    most: int
    prefers_larger: bool
    per_node: int
    replica: int
    by_node: bool

    @property
    def room(self) -> int:
        """The largest micro batch that there is room for."""
        return self.largest // (self.per_node // self.replica) if self.by_node else self.largest

    def batch(self, ranks: int) -> ElasticBatch:
        """The total for a data-parallel size; in version 0.1 it is the same for all of them."""
        if not self.by_node:
            return self._by_rank(self.largest, least=self.least, most=self.most)
        per_node = self.per_node // self.replica
        nodes = self._by_rank(self.room, least=self.least // self.per_node, most=self.most // self.per_node)
        found = ElasticBatch(nodes.total * per_node, tuple(count * per_node for count in nodes.ranks))
        return found if ranks in found.ranks else self._for_these(ranks)

    def _for_these(self, ranks: int) -> ElasticBatch:
        """The largest total that suits just this number of ranks: what version 0.2 does where hosts do not fit."""
        totals = [self.largest // (micro * ranks) * micro * ranks for micro in self.micro_batches]
        return ElasticBatch(max(totals) if self.prefers_larger else min(totals), (ranks,))

    def _by_rank(self, largest: int, *, least: int, most: int) -> ElasticBatch:
        """Scale each micro batch, and their least common multiple, and take what has the most divisors."""
        smallest = min(self.micro_batches)
        bases = [base for base in (*self.micro_batches, math.lcm(*self.micro_batches)) if base <= largest]
        best = ElasticBatch(smallest, ())
        for total in sorted({_scaled(base, largest) for base in bases}):
            found = _divisors(total, self.micro_batches, least=least or 1, most=most or largest // smallest)
            is_next = total > best.total if self.prefers_larger else total < best.total
            if len(found) > len(best.ranks) or (len(found) == len(best.ranks) and is_next):
                best = ElasticBatch(total, found)
        return best


def _scaled(base: int, largest: int) -> int:
    return base * _MANY_DIVISORS[bisect_right(_MANY_DIVISORS, largest // base) - 1]


def _divisors(total: int, micro_batches: Sequence[int], *, least: int, most: int) -> tuple[int, ...]:
    """Numbers of ranks that can share a total in whole micro batches."""
    found: set[int] = set()
    for micro in micro_batches:
        if total % micro == 0:
            top = total // micro
            small = [count for count in range(1, math.isqrt(top) + 1) if top % count == 0]
            found |= {count for divisor in small for count in (divisor, top // divisor)}
    return tuple(sorted(count for count in found if least <= count <= most))
