"""What is printed when a run is lost: who is to blame, and where every rank stood."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MOST_GROUPS = 24
_MOST_FRAMES = 12
_INNERMOST = 3
_FRAMES_LEFT_OUT = ("neox/parallel/collectives.py", "neox/watch/", "neox/launch/", "torch/distributed/c10d_logger.py")
"""What stands around every call."""


def ranges(numbers: Iterable[int]) -> str:
    """`0-511,513` for numbers in order."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def ranks(numbers: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2,7`."""
    return f"rank{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def places(standings: Mapping[int, Mapping[str, Any]], silent: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """The lines that say where every rank stood; ranks that stand at the same place share one paragraph.

    Args:
        standings: by rank, what it answered.
        silent: by rank, what its last heartbeat told; empty if it never sent one.
    """
    groups: dict[str, list[int]] = {}
    for rank, standing in sorted(standings.items()):
        groups.setdefault("\n".join(_key(standing)), []).append(rank)
    lines = ["Where every rank stood:"]
    lines += [f"  {ranks([rank])}: {_last_heard(sign)}" for rank, sign in sorted(silent.items())]
    for number, members in enumerate(sorted(groups.values(), key=len)):
        if number == _MOST_GROUPS:
            lines.append(f"  and {len(groups) - number} more places")
            break
        lines += _paragraph(members, [standings[rank] for rank in members])
    return lines


def own_lines(standing: Mapping[str, Any], *, with_stack: bool) -> list[str]:
    """Where this process stands, for itself."""
    line = f"  it stood at {describe(standing)}{_seconds([standing])}"
    return [line, *(_stack_lines(standing["stacks"]) if with_stack else ())]


def describe(sign: Mapping[str, Any]) -> str:
    """Step, phase and last collective."""
    last, phase = sign["last"], "" if sign["phase"] == "training" else f" ({sign['phase']})"
    words = f"step {sign['step']}{phase}, "
    if last is None:
        return words + "before any collective"
    size = f", {last['elements']} elements" if last["elements"] else ""
    call = f"{last['name']} (call {last['call']}{size}, {last['ranks']} ranks)"
    if last["failed"]:
        return words + f"failed in {call}"
    return words + (f"in {call}" if last["inside"] else f"outside of a collective, the last was {call}")


def _key(standing: Mapping[str, Any]) -> list[str]:
    return [describe(standing), *_stack_lines(standing["stacks"])]


def _paragraph(members: list[int], standings: list[Mapping[str, Any]]) -> list[str]:
    head = f"  {ranks(members)}: {describe(standings[0])}{_seconds(standings)}"
    return [head, *_stack_lines(standings[0]["stacks"])]


def _seconds(standings: Sequence[Mapping[str, Any]]) -> str:
    found = [standing["last"]["seconds"] for standing in standings if standing["last"] is not None]
    if not found:
        return ""
    least, most = f"{min(found):.1f}", f"{max(found):.1f}"
    return f", for {least} s" if least == most else f", for {least} to {most} s"


def _last_heard(sign: Mapping[str, Any]) -> str:
    if "step" not in sign:
        return "never heard of"
    return f"last heard of at {describe(sign)}, {sign['ago']:.1f} s before"


def _stack_lines(stacks: Mapping[str, Sequence[str]]) -> list[str]:
    """The stacks, the innermost function last: our own functions, and the last few of libraries."""
    lines = []
    for name, frames in stacks.items():
        if name:
            lines.append(f"    thread {name}:")
        told = [frame for frame in frames if not frame.startswith(_FRAMES_LEFT_OUT)]
        shown = [frame for frame in told[:-_INNERMOST] if frame.startswith("neox/")]
        lines += [f"    {frame}" for frame in [*shown, *told[-_INNERMOST:]][-_MOST_FRAMES:]]
    return lines
