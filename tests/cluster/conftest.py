"""Fixtures of tests that need two hosts. `tests/cluster/run.py` says which of them this machine can give."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hosts import NAMES, Cluster, cluster, start_slurm, start_ssh, stop_slurm
from tiny_run import Training, losses
from training.layouts import ADAMW, MODEL, TRAINING, write_corpus

MISSING = "NEOX_CLUSTER_MISSING"
"""Variable with the parts that cannot be had here, which are names of fixtures."""

collect_ignore_glob = [] if MISSING in os.environ else ["test_*.py"]
"""`make test` leaves this folder to `make test-cluster`."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = set(os.environ.get(MISSING, "").split(","))
    without = [item for item in items if missing & set(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=without)
    items[:] = [item for item in items if item not in without]


@pytest.fixture(scope="session")
def two() -> Iterator[Cluster]:
    """Two hosts."""
    # Of a short name, as paths of sockets have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="neox-") as folder, cluster(Path(folder)) as made:
        yield made


@pytest.fixture(scope="session")
def ssh(two: Cluster) -> Cluster:
    """Two hosts with sshd."""
    start_ssh(two)
    (two.folder / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    (two.folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    return two


@pytest.fixture(scope="session")
def pdsh(ssh: Cluster) -> Cluster:
    """Two hosts with sshd, and pdsh."""
    return ssh


@pytest.fixture(scope="session")
def openmpi(ssh: Cluster) -> Cluster:
    """Two hosts with sshd, and Open MPI."""
    # It warns root twice.
    ssh.variables |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return ssh


@pytest.fixture(scope="session")
def mpich(ssh: Cluster) -> Cluster:
    """Two hosts with sshd, and MPICH."""
    return ssh


@pytest.fixture(scope="session")
def slurm(two: Cluster) -> Iterator[Cluster]:
    """Two hosts with Slurm."""
    start_slurm(two)
    yield two
    stop_slurm(two)


@pytest.fixture(scope="session")
def training(two: Cluster) -> Training:
    """The run, and the losses that every launcher must give."""
    corpus = write_corpus(two.folder / "corpus_text_document")
    run: dict[str, Any] = {"data_path": corpus, "checkpoint_factor": 5, "train_iters": 10, "log_interval": 1}
    config = two.folder / "model.yml"
    # 512 are the tokens of the tokenizer that needs no file.
    vocabulary = {"padded_vocab_size": 512, "tokenizer_type": "CharLevelTokenizer"}
    config.write_text(json.dumps(MODEL | TRAINING | ADAMW | vocabulary | run, indent=1))
    found = Training(config, [])
    save = two.folder / "one-host"
    status, out = two.run("n1", sys.executable, *found.script(save, "num_gpus=2"))
    assert status == 0, out
    assert "launcher: none; 2 processes on this machine" in out
    found.losses = losses(save)
    assert len(found.losses) == 10
    assert found.losses[-1] < found.losses[0]
    return found
