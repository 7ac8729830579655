"""Files in which processes are started come first, so that no worker is left with one at the end."""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import machine
import pytest

LONG = ("training", "scripts", "model", "evaluation", "checkpoint", "inference", "quickstart")

_folder: Path | None = None

# Before other files of this kind import torch, which reads variables. Workers of pytest inherit all of it, and
# tests/cluster is there to use real launchers.
if "PYTEST_XDIST_WORKER" not in os.environ:
    machine.clean_environment()
    if "NEOX_CLUSTER_MISSING" not in os.environ:
        _folder = Path(tempfile.mkdtemp(prefix="neox-tests-"))
        machine.hide_programs(_folder)


def pytest_unconfigure() -> None:
    """Remove the folder of programs, which the workers no longer need."""
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder; within a folder the order stays."""
    folders = Path(__file__).parent
    rank = {folders / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.parent, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def _processes() -> Iterator[None]:
    """Default signals for all processes; an end of those that a failed test has left, for which Python would wait."""
    machine.let_signals_through()
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """All programs of this machine; ranks that are started by the test find them too."""
    monkeypatch.setenv("PATH", os.environ[machine.WHOLE_PATH])
