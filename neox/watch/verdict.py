"""Who waits for whom: the ranks that hold up all others, from how many collectives each has begun."""

from collections.abc import Mapping
from typing import Any


def holding_up(standings: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """Ranks that others wait for and that wait for nobody.

    A rank that has begun more collectives of a group than another of its ranks waits for that one, or will. One that
    is waited for and waits itself only hands the wait on; where there are only such, they wait for each other, and
    all of them are named. The counts also tell where collectives return before they are done, as NCCL's do.

    Args:
        standings: by rank, its `started`: (name of the group, its ranks or None for all, collectives begun).

    Returns:
        In order; empty where nobody is behind.
    """
    groups: dict[str, dict[int, int]] = {}
    for rank, standing in standings.items():
        for name, members, count in standing["started"]:
            counts = groups.setdefault(name, {})
            for member in standings if members is None else members:
                if member in standings:
                    counts.setdefault(member, 0)
            counts[rank] = count
    behind, ahead = set(), set()
    for counts in groups.values():
        least, most = min(counts.values()), max(counts.values())
        behind |= {rank for rank, count in counts.items() if count < most}
        ahead |= {rank for rank, count in counts.items() if count > least}
    return sorted(behind - ahead) or sorted(behind)
