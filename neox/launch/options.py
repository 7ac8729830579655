"""Options that the commands of `python -m neox.launch` share, and what they mean."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neox.errors import ConfigError, LaunchError
from neox.launch.arguments import Arguments, Parser

if TYPE_CHECKING:
    from neox.config import Config


def positive(text: str) -> int:
    """The value of a flag that counts things of which there is at least one."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """The value of a flag that counts things of which there may be none."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
    return int(text)


def command_parser(name: str, description: str) -> Parser:
    """A parser for the words after the command's name."""
    return Parser(prog=f"python -m neox.launch {name}", description=description, allow_abbrev=False)


def add_configuration(parser: argparse.ArgumentParser, *, nargs: str = "+") -> None:
    """The configuration, as the scripts take it."""
    parser.add_argument("config", nargs=nargs, metavar="CONFIG | key=value", help="YAML files, then overrides")
    parser.add_argument("-d", "--conf_dir", metavar="DIR", help="folder of the configuration files")


def add_run(parser: argparse.ArgumentParser) -> None:
    """The configuration, what runs, on how many hosts, and the file to write."""
    add_configuration(parser)
    parser.add_argument("--nodes", required=True, metavar="N", help="hosts; MIN-MAX for Slurm and an elastic run")
    parser.add_argument("--gpus-per-node", type=natural, metavar="N", help="GPUs of each host; default: num_gpus, or 8")
    parser.add_argument(
        "--tasks-per-node", type=positive, metavar="N", help="processes of each host; default: one a GPU"
    )
    parser.add_argument(
        "--max-restarts", type=natural, default=3, metavar="N", help="after failures; default: %(default)s"
    )
    add_file(parser)


def add_file(parser: argparse.ArgumentParser) -> None:
    """What runs, and the file to write."""
    parser.add_argument("--name", metavar="NAME", help="of the job; default: that of the first configuration file")
    parser.add_argument("--script", default="train.py", metavar="FILE", help="default: %(default)s")
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write; default: named after the job")


def read_config(options: argparse.Namespace) -> "Config":
    """The configuration that the command line names.

    Raises:
        ConfigError: with one line for each mistake.
    """
    from neox.config import split_overrides

    files, overrides = split_overrides(options.config)
    if not files:
        raise LaunchError(
            "neox.launch: no configuration file given; example: configs/small.yml configs/local_setup.yml"
        )
    return Arguments(files, overrides, options.conf_dir).load()


def check_layout(config: "Config", processes: int) -> None:
    """Check that so many processes can train what is configured.

    Raises:
        ConfigError: naming what does not divide.
    """
    from neox.config import check_training

    check_training(config.with_world_size(processes))


def check_resumes(config: "Config", otherwise: str) -> None:
    """Check that a run which is started again goes on where it was.

    Args:
        config: of the run.
        otherwise: flags under which it is not started again.

    Raises:
        LaunchError: it saves nothing, or loads from elsewhere.
    """
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is None:
        raise LaunchError(f"save: a job that starts again needs a folder to go on from; set it, or {otherwise}")
    goes_on = load is not None and Path(load).absolute() == Path(save).absolute() and not config.checkpoint.finetune
    if config.reliability.auto_resume is False and not goes_on:
        raise LaunchError(f"auto_resume: false, and load is not {save}; starting again needs either, or {otherwise}")


def usable_nodes(options: argparse.Namespace, config: "Config", tasks: int) -> list[int]:
    """Numbers of hosts of `--nodes` that the layout and the batch can use.

    Raises:
        ConfigError: there are none; what is wrong with the most.
        LaunchError: a range is given for a run that is not elastic.
    """
    least, most = _nodes(options.nodes)
    if least != most and not config.reliability.elastic:
        raise LaunchError(f"--nodes {options.nodes}: a range is for runs with elastic: true; give one number")
    found = []
    for nodes in range(least, most + 1):
        try:
            check_layout(config, nodes * tasks)
        except ConfigError:
            continue
        found.append(nodes)
    if not found:
        check_layout(config, most * tasks)
    return found


def _nodes(text: str) -> tuple[int, int]:
    """The least and the most hosts of `N` or `MIN-MAX`."""
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= least <= most:
        raise LaunchError(f"--nodes {text}: give a number of hosts, from 1 to 9999, or MIN-MAX")
    return least, most


def processes_per_node(options: argparse.Namespace, config: "Config") -> tuple[int, int]:
    """GPUs and processes of each host.

    Raises:
        LaunchError: a number makes no sense.
    """
    gpus = options.gpus_per_node if options.gpus_per_node is not None else config.launch.num_gpus or 8
    tasks = options.tasks_per_node or gpus or 1
    if 0 < gpus < tasks:
        raise LaunchError(f"--tasks-per-node {tasks}: a host has {gpus} GPUs, one for each process; lower it")
    return gpus, tasks


def job_name(options: argparse.Namespace) -> str:
    """`--name`, or the first configuration file's without its extension."""
    return str(options.name or Path(options.config[0]).stem)


def output_file(options: argparse.Namespace, default: str) -> Path:
    """`--output`, or the default in this folder.

    Raises:
        UserError: it is a file of the command line, a configuration `<name>.yaml` say.
    """
    from neox.config import resolve_config_paths, split_overrides
    from neox.files import require_apart

    path = Path(options.output or default)
    files = resolve_config_paths(split_overrides(options.config)[0], options.conf_dir)
    require_apart(path, [*files, options.script, *filter(None, [getattr(options, "hostfile", None)])])
    return path


def configuration(options: argparse.Namespace) -> list[str]:
    """The words that name the configuration, for another command line."""
    return [*(["-d", options.conf_dir] if options.conf_dir else []), *options.config]


def script_command(options: argparse.Namespace, *, must_exist: bool = True) -> list[str]:
    """The script and its configuration.

    Raises:
        LaunchError: there is no such script.
    """
    if must_exist and not Path(options.script).is_file():
        raise LaunchError(f"--script {options.script}: no such file in {Path.cwd()}; run this beside train.py")
    return [options.script, *configuration(options)]


def chosen(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options by name."""
    return {name: getattr(options, name) for name in names}
