"""Files in which processes are started come first, so that no worker is left with one at the end."""

from pathlib import Path

import pytest

LONG = ("training", "scripts", "model", "evaluation", "checkpoint", "inference", "quickstart")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder; within a folder the order stays."""
    folders = Path(__file__).parent
    rank = {folders / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.parent, len(rank)))
