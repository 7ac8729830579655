"""Start a run on many hosts: `python -m neox.launch COMMAND ...`.

slurm       write a batch file that requeues itself and resumes; --submit gives it to Slurm
kubernetes  write a JobSet or PyTorchJob manifest
hostfile    write a start script for the hosts of a file
check       are the hosts of a file fit for a run? One table; exit status 0 is go, 1 no go
"""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from neox.errors import LaunchError
from neox.launch import options as shared
from neox.launch.hostfile import choose, read_hostfile
from neox.launch.hosts import starter_of
from neox.launch.kubernetes import Pods, manifest, spelled
from neox.launch.main import script_main
from neox.launch.preflight import check_hosts
from neox.launch.restarts import REQUEUE_STATUS
from neox.launch.slurm import Job, submit, write_batch_file
from neox.launch.start import EXIT_NO_GO
from neox.results import print_result


def main(argv: list[str]) -> int:
    """Run the command that `argv` starts with."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "slurm": slurm,
        "kubernetes": kubernetes,
        "hostfile": hostfile,
        "check": check,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print_result(__doc__)
        return 0
    if argv[0] not in commands:
        raise LaunchError(f"neox.launch: unknown command {argv[0]!r}; there are {', '.join(commands)}")
    return commands[argv[0]](argv[1:])


def slurm(argv: list[str]) -> int:
    """Write a batch file, and with `--submit` submit it."""
    parser = shared.command_parser(
        "slurm", "Write a batch file that saves before the time limit, requeues and resumes."
    )
    shared.add_run(parser)
    parser.add_argument("--time", metavar="D-HH:MM:SS", help="time limit of one turn")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME", help="default: the key account")
    parser.add_argument("--comment", metavar="TEXT", help="default: the key comment")
    parser.add_argument("--cpus-per-task", type=shared.positive, metavar="N", help="cores of each process")
    parser.add_argument("--logs", default="logs", metavar="DIR", help="folder of the log; default: %(default)s")
    parser.add_argument(
        "--warning", type=shared.positive, default=300, metavar="SECONDS", help="to save in; default: %(default)s"
    )
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="as --sbatch=--qos=high")
    parser.add_argument("--srun", action="append", default=[], metavar="OPTION", help="as --srun=--mpi=none")
    parser.add_argument("--no-requeue", dest="requeue", action="store_false", help="end when warned")
    parser.add_argument("--submit", action="store_true", help="submit the file")
    options = parser.parse_intermixed_args(argv)
    config = shared.read_config(options)
    gpus, tasks = shared.processes_per_node(options, config)
    nodes = shared.usable_nodes(options, config, tasks)
    if options.requeue or options.max_restarts:
        shared.check_resumes(config, "--no-requeue --max-restarts 0")
    # A run that was warned must not end as one that is done.
    status = config.reliability.requeue_status or REQUEUE_STATUS
    command = shared.script_command(options)
    job = Job(
        name=shared.job_name(options),
        nodes=nodes,
        tasks_per_node=tasks,
        gpus_per_node=gpus,
        command=[*command, f"requeue_status={status}"] if options.requeue else command,
        requeue_status=status,
        save=None if config.checkpoint.save is None else Path(config.checkpoint.save),
        check=shared.configuration(options) if config.launch.preflight else None,
        account=options.account or config.launch.account,
        comment=options.comment or config.launch.comment,
        **shared.chosen(options, "time", "partition", "cpus_per_task", "logs", "warning", "max_restarts"),
        **shared.chosen(options, "requeue", "sbatch", "srun"),
    )
    path = shared.output_file(options, f"{job.name}.sbatch")
    write_batch_file(job, path, folder=Path.cwd())
    print_result(f"job {submit(path)}" if options.submit else path)
    return 0


def kubernetes(argv: list[str]) -> int:
    """Write a manifest."""
    import yaml

    from neox.files import write_whole

    parser = shared.command_parser("kubernetes", "Write a Kubernetes manifest: one pod a host.")
    shared.add_run(parser)
    parser.add_argument("--image", required=True, metavar="IMAGE", help="container image with the code")
    parser.add_argument("--kind", choices=("jobset", "pytorchjob"), default="jobset", help="default: %(default)s")
    parser.add_argument("--folder", metavar="DIR", help="working folder in the container; default: the image's")
    parser.add_argument("--volume", action="append", default=[], metavar="CLAIM:PATH", help="a volume claim to mount")
    parser.add_argument("--namespace", metavar="NAME")
    options = parser.parse_intermixed_args(argv)
    config = shared.read_config(options)
    gpus, tasks = shared.processes_per_node(options, config)
    nodes = shared.usable_nodes(options, config, tasks)
    if len(nodes) > 1:
        raise LaunchError(f"--nodes {options.nodes}: a set of pods has one size; give one number")
    if options.max_restarts:
        shared.check_resumes(config, "--max-restarts 0")
    # A pod that ends with 0, because its host is wanted for something else, would count as done.
    status = config.reliability.requeue_status or REQUEUE_STATUS
    # Nothing tells a pod that it is not the first.
    again = ["auto_resume=true", f"requeue_status={status}"] if options.max_restarts else []
    pods = Pods(
        name=spelled(shared.job_name(options), nodes[0]),
        nodes=nodes[0],
        gpus_per_node=gpus,
        tasks_per_node=tasks,
        image=options.image,
        requeue_status=status,
        command=[*shared.script_command(options, must_exist=False), *again],
        volumes=options.volume,
        **shared.chosen(options, "folder", "max_restarts", "namespace"),
    )
    path = shared.output_file(options, f"{pods.name}.yaml")
    write_whole(path, yaml.safe_dump(manifest(pods, options.kind), sort_keys=False))
    print_result(path)
    return 0


def hostfile(argv: list[str]) -> int:
    """Write a script that starts the run on the hosts of a file."""
    from neox.files import write_whole

    parser = shared.command_parser("hostfile", "Write a start script for the hosts of a file.")
    parser.add_argument("hostfile", metavar="HOSTFILE", help="lines HOST slots=N")
    shared.add_configuration(parser)
    shared.add_file(parser)
    options = parser.parse_intermixed_args(argv)
    options.config.append(f"hostfile={Path(options.hostfile).absolute()}")
    config = shared.read_config(options)
    pool = choose(read_hostfile(Path(options.hostfile)), config)
    shared.check_layout(config, sum(map(len, pool.values())))
    command = shlex.join([sys.executable, "-u", *shared.script_command(options)])
    text = f"#!/bin/sh\n# {len(pool)} hosts by {starter_of(config)}\ncd {shlex.quote(os.getcwd())} || exit 1\n"
    path = shared.output_file(options, f"{shared.job_name(options)}.sh")
    write_whole(path, f"{text}exec {command}\n")
    path.chmod(0o755)
    print_result(path)
    return 0


def check(argv: list[str]) -> int:
    """Check hosts and print the table."""
    parser = shared.command_parser("check", "Are these hosts fit for a run?")
    parser.add_argument("hostfile", nargs="?", metavar="HOSTFILE", help="lines HOST slots=N; not with --slurm")
    shared.add_configuration(parser, nargs="*")
    parser.add_argument("--slurm", action="store_true", help="the hosts of the Slurm job around us")
    parser.add_argument(
        "--write-mb", type=shared.positive, default=256, metavar="MB", help="file that tells a disk's speed"
    )
    parser.add_argument(
        "--message-mb", type=shared.positive, default=64, metavar="MB", help="messages that tell a link's speed"
    )
    parser.add_argument("--timeout", type=shared.positive, default=120, metavar="SECONDS", help="for each step")
    options = parser.parse_intermixed_args(argv)
    words = [word for word in (options.hostfile, *options.config) if word is not None]
    path = None if options.slurm or not words else Path(words.pop(0))
    if path is None and not options.slurm:
        raise LaunchError(
            "neox.launch check: no HOSTFILE given; example: python -m neox.launch check hosts configs/small.yml"
        )
    options.config = words
    config = shared.read_config(options) if words else None
    figures = shared.chosen(options, "write_mb", "message_mb", "timeout")
    return 0 if check_hosts(path, config, **figures) else EXIT_NO_GO


if __name__ == "__main__":
    sys.exit(script_main(main))
