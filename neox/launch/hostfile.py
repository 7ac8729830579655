"""The hosts of a run: lines `HOST slots=N`, and which of their slots the configuration chooses."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from neox.errors import LaunchError

if TYPE_CHECKING:
    from neox.config import Config

Pool = dict[str, tuple[int, ...]]
"""Slots of every host, in the order of ranks."""

HOSTFILE_VARIABLE = "DLTS_HOSTFILE"
USUAL_HOSTFILE = "/job/hostfile"

_LINE = re.compile(r"([^-\s]\S*)\s+slots=(\d{1,4})")  # ssh takes a name that begins with a dash for an option


def hostfile_path(config: "Config", environ: Mapping[str, str]) -> Path | None:
    """The file of hosts: `hostfile`, else $DLTS_HOSTFILE, else /job/hostfile; None where it does not exist."""
    path = Path(config.launch.hostfile or environ.get(HOSTFILE_VARIABLE) or USUAL_HOSTFILE)
    return path if path.is_file() else None


def check_hostfile(config: "Config", environ: Mapping[str, str]) -> None:
    """Refuse a file of hosts that is named and missing, where ranks are started; only /job/hostfile may be missing.

    Raises:
        LaunchError: it does not exist, and a run for many hosts would be one of this machine alone.
    """
    name, path, remedy = "hostfile", config.launch.hostfile, "set hostfile: null"
    if not path:
        name, path, remedy = f"${HOSTFILE_VARIABLE}", environ.get(HOSTFILE_VARIABLE), f"unset {HOSTFILE_VARIABLE}"
    if path and not Path(path).is_file():
        raise LaunchError(f"{name}: no such file {path}; correct it, or {remedy} to start on this machine alone")


def read_hostfile(path: Path) -> Pool:
    """Every host of a file with all its slots.

    Raises:
        LaunchError: the file cannot be read, names no host, names one twice, or a line is not `HOST slots=N`.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"{path}: cannot be read as a list of hosts ({error}); write lines `HOST slots=N`") from None
    pool: Pool = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None or int(found[2]) == 0 or not text.isprintable():
            raise LaunchError(f"{path}:{number}: {text!r} is not `HOST slots=N`, N from 1 to 9999; correct the line")
        if found[1] in pool:
            raise LaunchError(f"{path}:{number}: {found[1]} is there a second time; give each host one line")
        pool[found[1]] = tuple(range(int(found[2])))
    if not pool:
        raise LaunchError(f"{path}: no host in it; write lines `HOST slots=N`")
    return pool


def choose(pool: Pool, config: "Config") -> Pool:
    """The hosts and slots that `include` or `exclude`, `num_nodes` and `num_gpus` leave, in the file's order.

    Raises:
        LaunchError: a choice names what is not there, or leaves nothing.
    """
    launch = config.launch
    if launch.include:
        wanted = _named_slots("include", launch.include, pool)
        pool = {host: wanted[host] for host in pool if host in wanted}
    elif launch.exclude:
        unwanted = _named_slots("exclude", launch.exclude, pool)
        left = {host: tuple(s for s in slots if s not in unwanted.get(host, ())) for host, slots in pool.items()}
        pool = {host: slots for host, slots in left.items() if slots}
    if not pool:
        raise LaunchError(f"exclude: {launch.exclude!r} leaves no host; exclude fewer")
    if launch.num_nodes > len(pool):
        raise LaunchError(f"num_nodes: {launch.num_nodes} hosts are asked for, and there are {len(pool)}; lower it")
    hosts = list(pool)[: launch.num_nodes if launch.num_nodes > 0 else None]
    return {host: pool[host][: launch.num_gpus] for host in hosts}


def _named_slots(key: str, text: str, pool: Pool) -> Pool:
    """Slots by host of `host1:0,1@host2`; a host without slots means all of them."""
    named: Pool = {}
    for part in text.split("@"):
        host, _, numbers = part.strip().partition(":")
        if host not in pool:
            raise LaunchError(f"{key}: host {host!r} is not in the hostfile; it has {', '.join(pool)}")
        if numbers and not re.fullmatch(r"\d{1,4}(,\d{1,4})*", numbers):
            raise LaunchError(f"{key}: {part!r} is not HOST:SLOT,SLOT; write n1:0,1@n2 say")
        slots = {int(number) for number in numbers.split(",")} if numbers else set(pool[host])
        if missing := slots - set(pool[host]):
            raise LaunchError(f"{key}: {host} has slots 0 to {len(pool[host]) - 1}, not {min(missing)}")
        named[host] = tuple(sorted(slots | set(named.get(host, ()))))
    return named


def first_slots_only(pool: Pool) -> bool:
    """Whether every host starts at slot 0 without a gap, which is all that MPI and Slurm can be told."""
    return all(slots == tuple(range(len(slots))) for slots in pool.values())
