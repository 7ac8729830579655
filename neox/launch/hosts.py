"""Several hosts from one command: `python train.py` with a `hostfile` hands over to the DeepSpeed launcher."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from neox.errors import LaunchError

if TYPE_CHECKING:
    from neox.config import Config


def wants_launcher(config: "Config") -> bool:
    """Whether the configuration asks for hosts beyond what this process can start itself."""
    launch = config.launch
    return has_hostfile(config) or launch.deepspeed_slurm or launch.deepspeed_mpi or launch.force_multi


def has_hostfile(config: "Config") -> bool:
    """Whether there is a file of hosts; one that is named but missing means this machine alone, as upstream has it."""
    return config.launch.hostfile is not None and Path(config.launch.hostfile).is_file()


def deepspeed_command(config: "Config", argv: Sequence[str]) -> list[str]:
    """The command that starts the script on the hosts asked for, as upstream's own starter makes it.

    Args:
        config: `hostfile`, `include`, `exclude`, `num_nodes`, `num_gpus`, `launcher`, ... of its launch section.
        argv: script and arguments, as in `sys.argv`.

    Raises:
        LaunchError: `deepspeed_slurm` or `deepspeed_mpi` without a hostfile to read the hosts from.
    """
    launch = config.launch
    if not has_hostfile(config):
        starter = "srun" if launch.deepspeed_slurm else "mpirun"
        key = next(key for key in ("deepspeed_slurm", "deepspeed_mpi", "force_multi") if getattr(launch, key))
        typed = f"{starter} ... python {argv[0]} CONFIG..."
        raise LaunchError(f"{key}: start the script with `{typed}`, or give a hostfile")
    options = {
        "hostfile": launch.hostfile,
        "include": launch.include,
        "exclude": launch.exclude,
        "num_nodes": launch.num_nodes if launch.num_nodes > 0 else None,
        "num_gpus": launch.num_gpus,
        "master_port": launch.master_port,
        "master_addr": launch.master_addr,
        "launcher": "slurm" if launch.deepspeed_slurm else "openmpi" if launch.deepspeed_mpi else launch.launcher,
    }
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    command += [f"--{name}={value}" for name, value in options.items() if value is not None]
    command += ["--force_multi"] if launch.force_multi else []
    command += ["--no_ssh_check"] if launch.no_ssh_check else []
    slurm = [f"--{name}={value}" for name in ("comment", "account") if (value := getattr(launch, name))]
    command += [f"--launcher_args={' '.join(slurm)}"] if slurm else []
    return [*command, *argv]


def slots(config: "Config") -> int | None:
    """Number of processes that the hostfile promises; None where `include` or `exclude` make it the launcher's to know.

    Raises:
        LaunchError: a line is not `HOST slots=N`.
    """
    launch = config.launch
    if not has_hostfile(config) or launch.include or launch.exclude:
        return None
    path = Path(str(launch.hostfile))
    counts = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"\S+\s+slots\s*=\s*(\d+)", text)
        if found is None:
            raise LaunchError(f"{path}:{number}: {text!r} is not `HOST slots=N`")
        counts.append(int(found[1]))
    if launch.num_nodes > 0:
        counts = counts[: launch.num_nodes]
    return sum(min(count, launch.num_gpus or count) for count in counts)
