"""Several hosts from one command: `python train.py` with a hostfile, or inside a Slurm allocation."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neox.errors import LaunchError
from neox.launch.hostfile import Pool, choose, first_slots_only, hostfile_path, read_hostfile
from neox.launch.nodelist import expand_nodelist

if TYPE_CHECKING:
    from neox.config import Config

_CARRIED = ("NCCL_", "GLOO_", "UCX_", "MV2_", "PYTHON", "TORCH_", "HF_", "WANDB_", "MLFLOW")
_CARRIED_NAMES = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "LD_LIBRARY_PATH")


def has_hostfile(config: "Config") -> bool:
    """Whether there is a file of hosts."""
    return hostfile_path(config, os.environ) is not None


def wants_launcher(config: "Config") -> bool:
    """Whether the configuration asks for hosts beyond what this process can start itself."""
    launch = config.launch
    return has_hostfile(config) or launch.deepspeed_slurm or launch.deepspeed_mpi or launch.force_multi


def starter_of(config: "Config") -> str:
    """Name of what starts the processes: `launcher`, unless `deepspeed_slurm` or `deepspeed_mpi` outranks it."""
    launch = config.launch
    return "slurm" if launch.deepspeed_slurm else "openmpi" if launch.deepspeed_mpi else launch.launcher


def chosen_hosts(config: "Config", environ: Mapping[str, str]) -> Pool:
    """Hosts and slots of the run: the hostfile's, or those of the Slurm allocation around us.

    Raises:
        LaunchError: there is neither, or the configuration chooses what is not there.
    """
    path = hostfile_path(config, environ)
    if path is not None:
        return choose(read_hostfile(path), config)
    job = allocation(environ, config.launch.num_gpus) if starter_of(config) == "slurm" else None
    if job is not None:
        return choose(job, config)
    starter = "srun" if starter_of(config) == "slurm" else "mpirun"
    keys = ("deepspeed_slurm", "deepspeed_mpi", "force_multi")
    key = next(key for key in keys if getattr(config.launch, key))
    raise LaunchError(f"{key}: start the script with `{starter} ... python train.py CONFIG...`, or give a hostfile")


def allocation(environ: Mapping[str, str], slots: int | None) -> Pool | None:
    """Hosts of the Slurm job around us with `slots` each, or as many as the job says; None where there is no job.

    Raises:
        LaunchError: the job does not say how many processes a host is to have.
    """
    if not environ.get("SLURM_JOB_NODELIST"):
        return None
    each = slots or _tasks_per_node(environ)
    return {host: tuple(range(each)) for host in expand_nodelist(environ["SLURM_JOB_NODELIST"])}


def _tasks_per_node(environ: Mapping[str, str]) -> int:
    for name in ("SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        if environ.get(name, "").isdigit():
            return int(environ[name])
    raise LaunchError("num_gpus: set it to the processes of each host; the Slurm allocation does not tell")


def start_command(config: "Config", pool: Pool, argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command that starts the script on the hosts: mpirun, srun, or for pdsh DeepSpeed's launcher.

    Args:
        config: `launcher`, `master_addr`, ... of its launch section.
        pool: hosts and slots, as `chosen_hosts` gives them.
        argv: script and arguments, as in `sys.argv`.
        environ: variables of this process.

    Raises:
        LaunchError: the program is not installed, or cannot be told to use these slots.
    """
    starter = starter_of(config)
    if starter == "pdsh":
        _find(starter, "pdsh")
        return _deepspeed(config, pool, argv, environ)
    if not first_slots_only(pool):
        raise LaunchError(f"launcher: {starter} cannot be told which slots of a host to use; set launcher: pdsh or ssh")
    script = [sys.executable, "-u", os.path.abspath(argv[0]), *argv[1:]]
    if starter == "slurm":
        return [*_srun(config, pool, environ), *script]
    meeting = {
        "MASTER_ADDR": master_address(config, environ) or next(iter(pool)),
        "MASTER_PORT": str(config.launch.master_port),
    }
    variables = carried_variables(environ) | meeting
    total = str(sum(map(len, pool.values())))
    hosts = ",".join(f"{host}:{len(slots)}" for host, slots in pool.items())
    if starter == "openmpi":
        exports = [word for name, value in variables.items() for word in ("-x", f"{name}={value}")]
        return [_find(starter, "mpirun.openmpi", "mpirun"), "-n", total, "--host", hosts, *exports, *script]
    exports = [word for name, value in variables.items() for word in ("-genv", name, value)]
    return [_find(starter, "mpiexec.hydra", "mpirun"), "-n", total, "-hosts", hosts, *exports, *script]


def _find(starter: str, *programs: str) -> str:
    found = next((program for program in programs if shutil.which(program)), None)
    if found is None:
        raise LaunchError(f"launcher: {starter} needs {programs[-1]}, which is not installed here; set launcher: ssh")
    return found


def master_address(config: "Config", environ: Mapping[str, str]) -> str | None:
    """Where processes meet, if the user says so: `master_addr`, else MASTER_ADDR."""
    return config.launch.master_addr or environ.get("MASTER_ADDR") or None


def _deepspeed(config: "Config", pool: Pool, argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    launch = config.launch
    options = {
        "hostfile": hostfile_path(config, environ),
        # What is chosen in full, so that both programs cannot come to different choices.
        "include": "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in pool.items()),
        "master_port": launch.master_port,
        "master_addr": master_address(config, environ),
        "launcher": "pdsh",
    }
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    command += ["--force_multi"] if launch.force_multi else []
    # Every host has been asked already, or none is to be.
    return [*command, "--no_ssh_check", *argv]


def _srun(config: "Config", pool: Pool, environ: Mapping[str, str]) -> list[str]:
    counts = {len(slots) for slots in pool.values()}
    if len(counts) > 1:
        numbers = ", ".join(f"{len(slots)} on {host}" for host, slots in pool.items())
        raise LaunchError(f"launcher: slurm starts as many processes on every host, not {numbers}; set num_gpus")
    launch = config.launch
    # A port that nobody chose is one of the job's own: neighbours in the queue may share a host.
    port = launch.master_port if "master_port" in launch.model_fields_set else None
    meeting = {"MASTER_ADDR": launch.master_addr, "MASTER_PORT": port}
    exports = ["ALL", *(f"{name}={value}" for name, value in meeting.items() if value is not None)]
    options = {
        "export": ",".join(exports) if len(exports) > 1 else None,
        "comment": launch.comment,
        "account": launch.account,
        # srun itself does not take it over from the job since Slurm 22.05.
        "cpus-per-task": environ.get("SLURM_CPUS_PER_TASK"),
    }
    each = counts.pop()
    return [
        _find("slurm", "srun"),
        f"--nodes={len(pool)}",
        f"--ntasks={len(pool) * each}",
        f"--ntasks-per-node={each}",
        f"--nodelist={','.join(pool)}",
        "--kill-on-bad-exit=1",
        *(f"--{name}={value}" for name, value in options.items() if value),
    ]


def carried_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that other hosts need: those of NCCL, Python and the like, and the lines of `.deepspeed_env`.

    The file is looked for in the home folder, then here, by this name or the one that DS_ENV_FILE says; later ones win.

    Raises:
        LaunchError: DS_ENV_FILE names no file, or a line is not `NAME=value`.
    """
    found = {name: value for name, value in environ.items() if name.startswith(_CARRIED) or name in _CARRIED_NAMES}
    asked = environ.get("DS_ENV_FILE")
    places = [folder / (asked or ".deepspeed_env") for folder in (Path.home(), Path())]
    there = [path for path in places if path.is_file()]
    if asked and not there:
        raise LaunchError(f"DS_ENV_FILE: no such file {asked}, here or in the home folder; correct it, or unset it")
    for path in there:
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
            if line.strip() and not line.strip().startswith("#"):
                name, value = _variable(line.strip(), f"{path}:{number}")
                found[name] = value
    return found


def _variable(line: str, place: str) -> tuple[str, str]:
    """Name and value of a line of `.deepspeed_env`; one that is left out would be missed on the other hosts."""
    name, equals, value = line.partition("=")
    try:
        words = shlex.split(value)
    except ValueError:  # a quotation that does not end
        equals = ""
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise LaunchError(f"{place}: {line!r} is not `NAME=value`; correct it, or put # before it")
    return name, " ".join(words)
