"""Reading while writing: the next tensor comes from the disk while the one before is on its way out."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Make each item in a thread while the one before is in use; there are never more than these two.

    Args:
        items: what to make, tensors read from a file say. An error in making one is raised where it would be used.
    """
    source = iter(items)

    def make() -> list[Item]:
        return list(islice(source, 1))

    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = thread.submit(make)
        while made := waiting.result():
            waiting = thread.submit(make)
            yield made.pop()  # not kept here while it is in use
