"""Places in the order in which a run reads samples, and ranges of it that are passed over.

Place n is sample n modulo the length of the dataset. A range is [start, end) in places.
"""

from collections.abc import Iterable, Iterator, Sequence

Range = Sequence[int]
Ranges = Sequence[Range]


def merged(ranges: Iterable[Range]) -> list[list[int]]:
    """The same places as ranges that are sorted, apart from each other and not empty."""
    found: list[list[int]] = []
    for start, end in sorted((int(start), int(end)) for start, end in ranges):
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1][1] = max(found[-1][1], end)
        else:
            found.append([start, end])
    return found


def advance(place: int, count: int, left_out: Ranges) -> int:
    """The place behind the `count`-th sample that is read from `place` on; `place` itself where `count` is 0.

    Args:
        place: where the run stands.
        count: samples to read.
        left_out: as `merged` makes them.
    """
    if count == 0:
        return place
    for start, end in left_out:
        if end <= place:
            continue
        before = max(0, start - place)
        if count <= before:
            break
        place, count = end, count - before
    return place + count


def read_before(place: int, left_out: Ranges) -> int:
    """How many samples are read before a place."""
    return place - sum(max(0, min(end, place) - start) for start, end in left_out)


def read_places(place: int, left_out: Ranges) -> Iterator[int]:
    """The places that are read from `place` on, without end."""
    for start, end in left_out:
        if end > place:
            yield from range(place, start)
            place = end
    while True:
        yield place
        place += 1
