"""How far reading and writing have come, for whoever watches a terminal."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm


def byte_bar(total: int, label: str) -> "tqdm[Any]":
    """A context that counts bytes with `update(count)` on stderr; shows nothing where that is no terminal."""
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None, leave=False)


def progress_bar(names: Iterable[str], sizes: Mapping[str, int], label: str) -> Iterator[str]:
    """Give the names one by one, and show how many bytes are done (see `byte_bar`).

    Args:
        names: of tensors or files, in the order of the work; a name counts as done when the next is asked for.
        sizes: bytes of each, of these names at least.
        label: what is being done, `reading` say.
    """
    ordered = list(names)
    with byte_bar(sum(sizes[name] for name in ordered), label) as bar:
        for name in ordered:
            yield name
            bar.update(sizes[name])
