"""The text that the tests train on: a file of the repository, so that it is the same on every machine."""

from functools import cache
from pathlib import Path


@cache
def documents() -> list[str]:
    """72 invented Python modules, of at most 3,000 ASCII characters each."""
    path = Path(__file__).parent / "data" / "corpus.txt"
    return path.read_text(encoding="ascii").split("\f\n")
