"""The check of all hosts before a long run, as a table on stderr."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from neox.errors import LaunchError
from neox.launch.check import Questions, check
from neox.launch.hostfile import Pool, choose, read_hostfile
from neox.launch.hosts import allocation, master_address
from neox.launch.verdict import Row, is_go

if TYPE_CHECKING:
    from neox.config import Config

_MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]look[/]", "fail": "[bold red]FAIL[/]"}


def check_hosts(
    hostfile: Path | None,
    config: "Config | None",
    *,
    write_mb: int = 256,
    message_mb: int = 64,
    timeout: float = 120.0,
) -> bool:
    """Check hosts for a run, print what was found, and return whether it may start.

    Args:
        hostfile: reached over ssh; None for the hosts of the Slurm job around us.
        config: of the run; without one, folders and data are not looked at.
        write_mb: of the file that tells a disk's speed.
        message_mb: of the messages that tell a link's speed.
        timeout: seconds for each step.

    Raises:
        LaunchError: the hostfile is wrong, or there is no Slurm job.
    """
    from neox.config import named_datasets

    pool = _pool(hostfile, config)
    prefixes = dict.fromkeys(named_datasets(config).values() if config else ())
    save = config.checkpoint.save if config else None
    questions = Questions(
        pool=pool,
        road="ssh" if hostfile else "srun",
        save=os.path.abspath(save) if save else None,
        data=[os.path.abspath(prefix) for prefix in prefixes],
        checkpoint_bytes=checkpoint_bytes(config) if config else 0,
        master_addr=master_address(config, os.environ) if config else os.environ.get("MASTER_ADDR"),
        master_port=config.launch.master_port if config else 29500,
        write_mb=write_mb,
        message_mb=message_mb,
        timeout=timeout,
    )
    rows = check(questions)
    print_table(rows, hosts=len(pool))
    return is_go(rows)


def _pool(hostfile: Path | None, config: "Config | None") -> Pool:
    if hostfile is not None:
        pool = read_hostfile(hostfile)
        return choose(pool, config) if config else pool
    found = allocation(os.environ, config.launch.num_gpus if config else None)
    if found is None:
        raise LaunchError(
            "neox.launch check --slurm: no Slurm job around us; run it in sbatch or salloc, or give HOSTFILE"
        )
    return found


def checkpoint_bytes(config: "Config") -> int:
    """About what a checkpoint takes: 14 bytes a weight, which are the weight, its fp32 copy and two moments."""
    model = config.model
    # Attention and an MLP of four times the width have 12 squares of the width a layer; two tables of the vocabulary.
    weights = 12 * model.num_layers * model.hidden_size**2 + 2 * (model.padded_vocab_size or 50304) * model.hidden_size
    return 14 * weights


def print_table(rows: list[Row], *, hosts: int) -> None:
    """Print the rows and the verdict to stderr."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    verdict = "go" if is_go(rows) else "no go"
    table = Table(title=f"{hosts} host{'s' if hosts > 1 else ''}: {verdict}", title_justify="left")
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(escape(row.name), _MARKS[row.state], escape(row.detail))
    # A log that is no terminal has no width; 80 columns would break every name.
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 200)
    console.print(table)
