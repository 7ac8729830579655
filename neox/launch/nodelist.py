"""Slurm's compressed host lists and task counts, read without `scontrol`, which containers lack."""

import itertools
import re

from neox.errors import LaunchError


def expand_nodelist(nodelist: str) -> list[str]:
    """Expand a Slurm host list in order: `"n[1-2,05],gpu"` -> `["n1", "n2", "n05", "gpu"]`.

    Zero padding is kept and one name may hold several brackets, as in `scontrol show hostnames`.

    Raises:
        LaunchError: the list is empty or its brackets are malformed.
    """
    names = [name for part in _split_outside_brackets(nodelist) for name in _expand_part(part, nodelist)]
    if not names:
        raise LaunchError(f"Slurm host list {nodelist!r} names no host: set MASTER_ADDR to the host of rank 0")
    return names


def tasks_on_node(counts: str, node: int) -> int | None:
    """Tasks on the `node`-th host in Slurm's notation: `"2(x3),1"` means 2, 2, 2, 1; None if unreadable."""
    for run in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run)
        if match is None:
            return None
        repeat = int(match[2] or 1)
        if node < repeat:
            return int(match[1])
        node -= repeat
    return None


def _split_outside_brackets(nodelist: str) -> list[str]:
    return [part for part in re.findall(r"(?:\[[^\]]*\]|[^,\[\]]|[\[\]])+", nodelist) if part.strip()]


def _expand_part(part: str, nodelist: str) -> list[str]:
    pieces = re.split(r"\[([^\[\]]*)\]", part.strip())
    if any("[" in text or "]" in text for text in pieces):
        raise _malformed(nodelist)
    # re.split with one group alternates plain text and bracket contents.
    choices = [[text] if i % 2 == 0 else _expand_ranges(text, nodelist) for i, text in enumerate(pieces)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def _expand_ranges(ranges: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None:
            raise _malformed(nodelist)
        first, last = match[1], match[2] or match[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _malformed(nodelist: str) -> LaunchError:
    return LaunchError(f"Slurm host list {nodelist!r} is malformed: set MASTER_ADDR to the host of rank 0")
