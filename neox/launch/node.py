"""Launchers that start one process for each host: which host this is, before it starts its own ranks.

1. `launcher: ssh` of this project, which sets NEOX_NODE_RANK and NEOX_SLOTS;
2. torchrun's PET_ names, which Kubeflow's operators and `neox.launch kubernetes` set in every pod;
3. a pod whose operator sets MASTER_ADDR, WORLD_SIZE (the number of pods) and RANK or JOB_COMPLETION_INDEX (which pod).

Inside a pod that `torchrun` serves, its ranks have torch's own names, and those are believed first
(`neox.launch.environment`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from neox.errors import LaunchError
from neox.launch.variables import DEFAULT_MASTER_PORT, integer, port

NODE_RANK = "NEOX_NODE_RANK"
SLOTS = "NEOX_SLOTS"  # processes of every host, as 8,8,4
IN_A_POD = "KUBERNETES_SERVICE_HOST"  # set by Kubernetes itself in every container

_LEFT_TO_THE_HOST = ("auto", "gpu", "cpu")
"""What torchrun takes in place of a number of processes."""


@dataclass(frozen=True)
class Node:
    """Place of this host among all of them.

    Attributes:
        rank: 0 .. count - 1.
        count: number of hosts.
        slots: processes of each host, None if every host decides for itself, all alike.
        master_addr: host of rank 0.
        master_port: TCP port of the rendezvous on that host.
        launcher: "ssh" or "kubernetes".
    """

    rank: int
    count: int
    slots: tuple[int, ...] | None
    master_addr: str
    master_port: int
    launcher: str

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.count:
            raise LaunchError(f"{self.launcher}: host {self.rank} is outside of {self.count} hosts; start all alike")
        if self.slots is not None and len(self.slots) != self.count:
            raise LaunchError(f"{self.launcher}: processes of {len(self.slots)} hosts are given for {self.count} hosts")

    def workers(self, default: int) -> int:
        """Processes to start on this host."""
        return default if self.slots is None else self.slots[self.rank]

    def world_size(self, workers: int) -> int:
        """Processes on all hosts, when this one starts `workers`."""
        return self.count * workers if self.slots is None else sum(self.slots)

    def first_rank(self, workers: int) -> int:
        """Rank of the first process of this host, when it starts `workers`."""
        return self.rank * workers if self.slots is None else sum(self.slots[: self.rank])


def detect_node(environ: Mapping[str, str]) -> Node | None:
    """Return the host that a launcher says this is, None where no launcher numbers hosts.

    Raises:
        LaunchError: the variables are incomplete or contradict each other.
    """
    if NODE_RANK in environ:
        return _from_ssh(environ)
    if environ.get("PET_NODE_RANK") and environ.get("PET_MASTER_ADDR"):
        return _from_torchruns_names(environ)
    if _is_numbered_pod(environ):
        return _from_pod(environ)
    return None


def check_alone(environ: Mapping[str, str]) -> None:
    """Refuse one of several hosts whose number is not known: each would be a run of its own.

    Raises:
        LaunchError: torchrun's variables speak of several hosts, and this one was not found among them.
    """
    if environ.get("PET_NNODES", "1") != "1":
        raise LaunchError(
            f"PET_NNODES={environ['PET_NNODES']}, but not both PET_NODE_RANK and PET_MASTER_ADDR are set: start "
            "`torchrun train.py`, which reads its other variables, or unset PET_NNODES to run on this host alone"
        )


def _is_numbered_pod(environ: Mapping[str, str]) -> bool:
    """Whether an operator numbered this pod; a process with LOCAL_RANK is a rank already."""
    numbered = environ.get("RANK") or environ.get("JOB_COMPLETION_INDEX")
    meeting = environ.get("MASTER_ADDR") and environ.get("WORLD_SIZE")
    return bool(IN_A_POD in environ and numbered and meeting and not environ.get("LOCAL_RANK"))


def _from_ssh(environ: Mapping[str, str]) -> Node:
    slots = tuple(int(text) for text in environ[SLOTS].split(","))
    return Node(
        rank=integer(environ, NODE_RANK),
        count=len(slots),
        slots=slots,
        master_addr=environ["MASTER_ADDR"],
        master_port=port(environ, "MASTER_PORT", DEFAULT_MASTER_PORT),
        launcher="ssh",
    )


def _from_torchruns_names(environ: Mapping[str, str]) -> Node:
    nodes = environ.get("PET_NNODES", "1")
    if ":" in nodes:
        raise LaunchError(f"PET_NNODES={nodes} is a range: start `torchrun train.py` in the pod, which can follow it")
    count = integer({"PET_NNODES": nodes}, "PET_NNODES")
    each = environ.get("PET_NPROC_PER_NODE") or "auto"
    if not each.isdecimal() and each not in _LEFT_TO_THE_HOST:
        raise LaunchError(f"PET_NPROC_PER_NODE={each!r}: expected a number, or {', '.join(_LEFT_TO_THE_HOST)}")
    return Node(
        rank=integer(environ, "PET_NODE_RANK"),
        count=count,
        slots=(int(each),) * count if each.isdecimal() else None,
        master_addr=environ["PET_MASTER_ADDR"],
        master_port=port(environ, "PET_MASTER_PORT", DEFAULT_MASTER_PORT),
        launcher="kubernetes",
    )


def _from_pod(environ: Mapping[str, str]) -> Node:
    return Node(
        rank=integer(environ, "RANK" if environ.get("RANK") else "JOB_COMPLETION_INDEX"),
        count=integer(environ, "WORLD_SIZE"),
        slots=None,
        master_addr=environ["MASTER_ADDR"],
        master_port=port(environ, "MASTER_PORT", DEFAULT_MASTER_PORT),
        launcher="kubernetes",
    )
