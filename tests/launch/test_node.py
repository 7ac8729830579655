"""Launchers that number hosts: which host this is, and the ranks that it starts."""

import json
import sys
from pathlib import Path

import pytest
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import config_from_dict
from neox.errors import LaunchError
from neox.launch.environment import describe, detect
from neox.launch.local import run_local
from neox.launch.node import Node, check_alone, detect_node
from neox.launch.start import Start

SSH = {"NEOX_NODE_RANK": "1", "NEOX_SLOTS": "2,4,2", "MASTER_ADDR": "n1", "MASTER_PORT": "29700"}
PET = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "job-master-0",
    "PET_MASTER_PORT": "23456",
}
# As Kubeflow's operator sets them beside torchrun's names: WORLD_SIZE counts processes there, RANK counts pods.
PYTORCHJOB = PET | {"WORLD_SIZE": "16", "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
POD = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "MASTER_ADDR": "job-0",
    "MASTER_PORT": "29500",
    "WORLD_SIZE": "3",
    "RANK": "2",
}
INDEXED = {name: value for name, value in POD.items() if name != "RANK"} | {"JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("environ", "node"),
    [
        (SSH, Node(1, 3, (2, 4, 2), "n1", 29700, "ssh")),
        (PET, Node(1, 2, (8, 8), "job-master-0", 23456, "kubernetes")),
        (PYTORCHJOB, Node(1, 2, (8, 8), "job-master-0", 23456, "kubernetes")),
        (PET | {"PET_NPROC_PER_NODE": "auto"}, Node(1, 2, None, "job-master-0", 23456, "kubernetes")),
        (POD, Node(2, 3, None, "job-0", 29500, "kubernetes")),
        (INDEXED, Node(2, 3, None, "job-0", 29500, "kubernetes")),
    ],
    ids=["ssh", "torchrun's names", "PyTorchJob", "auto", "pod", "indexed job"],
)
def test_hosts_are_numbered(environ: dict[str, str], node: Node) -> None:
    assert detect_node(environ) == node
    assert detect(environ) is None


def test_ranks_of_a_numbered_host_are_ranks() -> None:
    rank = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}
    placement = detect(POD | PET | rank | {"TORCHELASTIC_RUN_ID": "x"})
    assert placement is not None
    assert describe(placement) == "launcher: torchrun; rank 9 of 16, meeting at n1:1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "10.96.0.1"},  # one of many jobs of its own
        {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "MASTER_ADDR": "a", "WORLD_SIZE": "2"},
    ],
    ids=["nothing", "an array", "no number"],
)
def test_no_host_is_numbered(environ: dict[str, str]) -> None:
    assert detect_node(environ) is None


def test_rank_without_local_rank_outside_of_kubernetes_is_a_mistake() -> None:
    environ = {name: value for name, value in POD.items() if name != "KUBERNETES_SERVICE_HOST"}
    with pytest.raises(LaunchError, match="not LOCAL_RANK"):
        detect(environ)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (SSH | {"NEOX_NODE_RANK": "3"}, "host 3 is outside of 3 hosts"),
        (PET | {"PET_NNODES": "1:4"}, "PET_NNODES=1:4 is a range"),
        (PET | {"PET_NPROC_PER_NODE": "eight"}, "PET_NPROC_PER_NODE='eight': expected a number, or auto, gpu, cpu"),
        (PET | {"PET_MASTER_PORT": "70000"}, "PET_MASTER_PORT=70000 is no port"),
        (POD | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
    ],
    ids=["too high", "elastic", "processes", "port", "no number"],
)
def test_contradictions(environ: dict[str, str], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        detect_node(environ)


def test_a_host_of_several_without_its_number_is_no_run_of_its_own() -> None:
    for environ in (PET | {"PET_MASTER_ADDR": ""}, {"PET_NNODES": "1:4", "PET_RDZV_ENDPOINT": "a:1"}):
        assert detect_node(environ) is None
        with pytest.raises(
            LaunchError, match="but not both PET_NODE_RANK and PET_MASTER_ADDR are set: start `torchrun"
        ):
            check_alone(environ)
    check_alone({"PET_NNODES": "1"})
    check_alone({})


def test_ranks_count_on_over_hosts(tmp_path: Path) -> None:
    """The second host of three, with 4 of 8 processes."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "from neox.launch.environment import detect\n"
        "place = vars(detect(os.environ)) | {'gloo': os.environ.get('GLOO_SOCKET_IFNAME')}\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(place))\n"
    )
    root = Path(__file__).resolve().parents[2]
    environ = SSH | {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"}
    node = detect_node(environ)
    assert run_local([str(script), str(tmp_path)], workers=4, environ=environ, node=node) == 0
    places = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2, 6)]
    assert [place["local_rank"] for place in places] == [0, 1, 2, 3]
    assert {place["world_size"] for place in places} == {8}
    assert {(place["master_addr"], place["master_port"]) for place in places} == {("n1", 29700)}
    # Between hosts gloo must not be tied to the loopback interface.
    assert {place["gloo"] for place in places} == {None}


def test_start_on_a_numbered_host(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_from_dict(MODEL | TRAINING | ADAMW | {"hostfile": sys.executable}, world_size=None)
    for name, value in (POD | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    start = Start(config, workers=4)
    assert (start.world_size, start.is_alone) == (12, False)
    assert start.description == "launcher: kubernetes; host 0 of 3, 4 of 12 processes here"
