"""Which rank this process is, read from the environment that its launcher prepared.

Launchers, in the order in which they are believed:

1. torch's own names (`torchrun`, the `deepspeed` launcher, Kubernetes operators, `neox.launch.local`);
2. Open MPI (`mpirun`), also inside a Slurm allocation, where SLURM_PROCID counts daemons, not ranks;
3. Slurm (`srun`), also with a PMI plugin, which adds PMI_RANK to the same numbers;
4. PMI (Hydra of MPICH and Intel MPI, MVAPICH).

Launchers that number hosts instead of processes are read by `neox.launch.node`; the process they start on each
host starts the ranks.

Slurm sets its variables in places that are no rank. A process counts as one only inside a step that `srun`
started: the batch script itself and the shells of `salloc` and `srun --pty` have no step, a step with a
reserved number, or a terminal, and run as if Slurm were not there. So `python train.py` typed there starts
local workers.
"""

import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from neox.errors import LaunchError
from neox.launch.node import detect_node
from neox.launch.nodelist import expand_nodelist, tasks_on_node
from neox.launch.variables import DEFAULT_MASTER_PORT, RESTARTS, integer, port

LOCAL_LAUNCH = "NEOX_LOCAL_LAUNCH"  # set by neox.launch.local in its workers
TORCH_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LOOPBACK = "127.0.0.1"

_SPELLING = {
    "environment": "torch's variables (RANK, WORLD_SIZE, ...)",
    "deepspeed": "DeepSpeed",
    "openmpi": "Open MPI",
    "slurm": "Slurm",
    "pmi": "MPI (PMI)",
}

# slurm.h: the numbers above are SLURM_INTERACTIVE_STEP, SLURM_BATCH_SCRIPT, SLURM_EXTERN_CONT, ...
_SLURM_MAX_NORMAL_STEP_ID = 0xFFFFFFF0


_BETWEEN_RESTARTS = 101
"""Ports between two starts of a job: its neighbours in the queue, whose numbers follow, may share the host."""


@dataclass(frozen=True)
class Placement:
    """Place of this process among all of them.

    Attributes:
        rank: 0 .. world_size - 1, over all hosts.
        local_rank: 0 .. on this host; the index of its GPU.
        world_size: number of processes.
        local_world_size: number of processes on this host, None if the launcher does not tell.
        master_addr: host of rank 0.
        master_port: TCP port of the rendezvous on that host.
        launcher: "local", "torchrun", "deepspeed", "environment", "openmpi", "slurm" or "pmi".
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None
    master_addr: str
    master_port: int
    launcher: str

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise LaunchError(
                f"{self.launcher}: rank {self.rank} is outside a world of {self.world_size}; "
                "start all processes with one launcher, or unset its variables"
            )
        size = self.world_size if self.local_world_size is None else self.local_world_size
        if not 0 <= self.local_rank < size <= self.world_size:
            raise LaunchError(
                f"{self.launcher}: local rank {self.local_rank} does not fit {size} processes on this host "
                f"of {self.world_size} in all; start all processes with one launcher, or unset its variables"
            )


def detect(environ: Mapping[str, str]) -> Placement | None:
    """Return the placement that a launcher gave this process, or None if it was started by hand.

    MASTER_ADDR and MASTER_PORT, when set, overrule what is derived from MPI or Slurm.

    Raises:
        LaunchError: the variables are incomplete or contradict each other.
    """
    given = [name for name in TORCH_NAMES if environ.get(name)]
    if len(given) == len(TORCH_NAMES):
        return _from_torch(environ)
    if detect_node(environ) is not None:
        return None
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _from_openmpi(environ)
    if _is_slurm_rank(environ) and not _is_hydra_in_slurm(environ):
        return _from_slurm(environ)
    if "PMI_RANK" in environ or "MV2_COMM_WORLD_RANK" in environ:
        return _from_pmi(environ)
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(given):
        missing = ", ".join(name for name in TORCH_NAMES if name not in given)
        raise LaunchError(f"{given[0]} is set but not {missing}: set all of {', '.join(TORCH_NAMES)}, or none")
    return None


def describe(placement: Placement | None) -> str:
    """One line: what started this process, and which of the processes it is."""
    if placement is None:
        return "launcher: none"
    here = "" if placement.local_world_size is None else f", {placement.local_world_size} on this host"
    meeting = f"{placement.master_addr}:{placement.master_port}"
    name = _SPELLING.get(placement.launcher, placement.launcher)
    return f"launcher: {name}; rank {placement.rank} of {placement.world_size}{here}, meeting at {meeting}"


def export(placement: Placement, environ: MutableMapping[str, str]) -> None:
    """Write the placement into `environ` under the names that torch and DeepSpeed read."""
    environ["RANK"] = str(placement.rank)
    environ["LOCAL_RANK"] = str(placement.local_rank)
    environ["WORLD_SIZE"] = str(placement.world_size)
    environ["MASTER_ADDR"] = placement.master_addr
    environ["MASTER_PORT"] = str(placement.master_port)
    if placement.local_world_size is not None:
        environ["LOCAL_WORLD_SIZE"] = str(placement.local_world_size)


def strip_local_rank(argv: Sequence[str]) -> list[str]:
    """Drop the `--local_rank=N` (or `--local-rank N`) that the deepspeed launcher adds."""
    kept: list[str] = []
    skip_value = False
    for argument in argv:
        if skip_value:
            skip_value = False
        elif argument in ("--local_rank", "--local-rank"):
            skip_value = True
        elif not re.fullmatch(r"--local[_-]rank=.*", argument):
            kept.append(argument)
    return kept


def _from_torch(environ: Mapping[str, str]) -> Placement:
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if environ.get(name)), None)
    return Placement(
        rank=integer(environ, "RANK"),
        local_rank=integer(environ, "LOCAL_RANK"),
        world_size=integer(environ, "WORLD_SIZE"),
        local_world_size=None if local_size is None else integer(environ, local_size),
        master_addr=environ["MASTER_ADDR"],
        master_port=port(environ, "MASTER_PORT", DEFAULT_MASTER_PORT),
        launcher=_torch_launcher(environ),
    )


def _torch_launcher(environ: Mapping[str, str]) -> str:
    # Each launcher leaves one variable that no other sets.
    marks = {LOCAL_LAUNCH: "local", "TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed"}
    return next((name for mark, name in marks.items() if mark in environ), "environment")


def _from_openmpi(environ: Mapping[str, str]) -> Placement:
    world_size = integer(environ, "OMPI_COMM_WORLD_SIZE")
    local_size = integer(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    return Placement(
        rank=integer(environ, "OMPI_COMM_WORLD_RANK"),
        local_rank=integer(environ, "OMPI_COMM_WORLD_LOCAL_RANK"),
        world_size=world_size,
        local_world_size=local_size,
        master_addr=_mpi_master(environ, one_host=local_size == world_size, give="-x MASTER_ADDR=HOST"),
        master_port=port(environ, "MASTER_PORT", DEFAULT_MASTER_PORT),
        launcher="openmpi",
    )


def _from_pmi(environ: Mapping[str, str]) -> Placement:
    # MVAPICH's own mpirun_rsh sets names of its own only.
    names = "PMI" if "PMI_RANK" in environ else "MV2_COMM_WORLD"
    world_size = integer(environ, f"{names}_SIZE")
    local_rank, local_size = _pmi_local(environ, world_size)
    return Placement(
        rank=integer(environ, f"{names}_RANK"),
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_size,
        master_addr=_mpi_master(environ, one_host=local_size == world_size, give="-genv MASTER_ADDR HOST"),
        master_port=port(environ, "MASTER_PORT", DEFAULT_MASTER_PORT),
        launcher="pmi",
    )


def _pmi_local(environ: Mapping[str, str], world_size: int) -> tuple[int, int | None]:
    # MVAPICH 2 and 3, then Hydra (MPICH, Intel MPI). PMI itself knows no local rank.
    names = (
        ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
        ("MVP_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_SIZE"),
        ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    )
    for rank_name, size_name in names:
        if rank_name in environ:
            return integer(environ, rank_name), integer(environ, size_name) if size_name in environ else None
    if world_size == 1:
        return 0, 1
    raise LaunchError(
        "PMI_RANK is set but no local rank: set MV2_COMM_WORLD_LOCAL_RANK or MPI_LOCALRANKID, or use torchrun"
    )


def _mpi_master(environ: Mapping[str, str], *, one_host: bool, give: str) -> str:
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    if one_host:
        return LOOPBACK
    raise LaunchError(f"MASTER_ADDR is not set and MPI runs on several hosts: add `{give}` with the host of rank 0")


def _is_slurm_rank(environ: Mapping[str, str]) -> bool:
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) > _SLURM_MAX_NORMAL_STEP_ID or "SLURM_PTY_PORT" in environ:
        return False
    return "SLURM_PROCID" in environ


def _is_hydra_in_slurm(environ: Mapping[str, str]) -> bool:
    # Hydra starts one proxy a host through srun: then Slurm's numbers are the proxy's and PMI's are the
    # rank's.
    slurm = environ.get("SLURM_PROCID"), environ.get(_slurm_size_name(environ))
    return "PMI_RANK" in environ and (environ["PMI_RANK"], environ.get("PMI_SIZE")) != slurm


def _slurm_size_name(environ: Mapping[str, str]) -> str:
    # SLURM_NTASKS may still be the job's; the step's own count is right where Slurm gives it.
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def _from_slurm(environ: Mapping[str, str]) -> Placement:
    world_size = integer(environ, _slurm_size_name(environ))
    return Placement(
        rank=integer(environ, "SLURM_PROCID"),
        local_rank=integer(environ, "SLURM_LOCALID"),
        world_size=world_size,
        local_world_size=_slurm_local_size(environ, world_size),
        master_addr=environ.get("MASTER_ADDR") or _slurm_first_host(environ),
        master_port=port(environ, "MASTER_PORT", _slurm_port(environ)),
        launcher="slurm",
    )


def _slurm_port(environ: Mapping[str, str]) -> int:
    # Another one for each restart inside the job: a process of the step before may still have its port.
    restarts = integer(environ, RESTARTS) if RESTARTS in environ else 0
    return 20000 + (integer(environ, "SLURM_JOB_ID") + _BETWEEN_RESTARTS * restarts) % 10000


def _slurm_first_host(environ: Mapping[str, str]) -> str:
    # A step may use part of the job's hosts, and rank 0 is on the first of the step's.
    nodelist = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodelist:
        raise LaunchError("SLURM_PROCID is set but not SLURM_JOB_NODELIST: set MASTER_ADDR to the host of rank 0")
    return expand_nodelist(nodelist)[0]


def _slurm_local_size(environ: Mapping[str, str], world_size: int) -> int | None:
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if counts and "SLURM_NODEID" in environ:
        size = tasks_on_node(counts, integer(environ, "SLURM_NODEID"))
        return None if size is None else min(size, world_size)
    return None
