"""What a script that no launcher started does: start its ranks here, or hand over to what starts them elsewhere."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from neox import results
from neox.errors import LaunchError
from neox.launch.hostfile import Pool, check_hostfile, hostfile_path
from neox.launch.hosts import chosen_hosts, start_command, starter_of, wants_launcher
from neox.launch.local import run_local
from neox.launch.node import Node, check_alone, detect_node
from neox.launch.over_ssh import RunOverSsh, largest_usable
from neox.launch.restarts import Restarts, run_with_restarts, times_restarted
from neox.launch.ssh import check_reachable
from neox.launch.variables import RESTARTS

if TYPE_CHECKING:
    from neox.config import Config


EXIT_NO_GO = 1
"""Status of a start that the check of all hosts stopped."""


class Start:
    """How the ranks of a script come to be, found before any of them exists.

    Attributes:
        world_size: number of processes.
        description: one line for the user.
    """

    def __init__(self, config: "Config", *, workers: int, restarts: Restarts | None = None) -> None:
        """Find where the ranks will run.

        Args:
            config: hosts and launcher of its launch section.
            workers: processes for this machine, where nothing else says how many.
            restarts: how often they are started again; only what starts all ranks of a run does so.

        Raises:
            LaunchError: the hostfile is missing or wrong, or chooses what is not there, or its launcher cannot start
                again.
            ConfigError: no number of the hosts is one that an elastic run can use.
        """
        self._config = config
        self._node: Node | None = detect_node(os.environ)
        self._restarts = Restarts() if restarts is None or self._node is not None else restarts
        self._pool: Pool | None = None
        self._hosts: Pool = {}
        """Hosts of the file, of which an elastic run may use fewer."""
        if self._node is None:
            check_hostfile(config, os.environ)
            if wants_launcher(config):
                self._choose_hosts()
            else:
                check_alone(os.environ)
            if config.launch.num_nodes > 1 and self._pool is None:
                raise LaunchError(
                    f"num_nodes: {config.launch.num_nodes} hosts are asked for, and no hostfile names them; set "
                    "hostfile (-H), start the script with a launcher, or remove num_nodes"
                )
        self._workers = self._node.workers(workers) if self._node else workers
        self.world_size = self._count()
        self.description = self._describe()
        """What was found, in one line; empty where there is nothing to tell."""

    def _choose_hosts(self) -> None:
        config, starter = self._config, starter_of(self._config)
        if self._restarts.limit and starter != "ssh":
            raise LaunchError(
                f"max_restarts: launcher {starter} cannot start ranks again; set launcher: ssh, or max_restarts: 0"
            )
        self._hosts = chosen_hosts(config, os.environ)
        is_elastic = config.reliability.elastic and starter == "ssh"
        self._pool = largest_usable(config, self._hosts) if is_elastic else self._hosts

    def _count(self) -> int:
        if self._pool is not None:
            return sum(map(len, self._pool.values()))
        return self._node.world_size(self._workers) if self._node else self._workers

    def _describe(self) -> str:
        many = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        if self._pool is not None:
            return f"launcher: {starter_of(self._config)}; {many} on {len(self._pool)} hosts ({', '.join(self._pool)})"
        if self._node is not None:
            host = f"host {self._node.rank} of {self._node.count}"
            return f"launcher: {self._node.launcher}; {host}, {self._workers} of {many} here"
        return f"launcher: none; {many} on this machine" if self.world_size > 1 else ""

    @property
    def is_alone(self) -> bool:
        """Whether this process is to do the work by itself."""
        return self._pool is None and self.world_size == 1 and not self._restarts.limit

    @property
    def speaks(self) -> bool:
        """Whether this process, among those that start ranks, is the one that prints."""
        return self._node is None or self._node.rank == 0

    def run(self, argv: Sequence[str]) -> int:
        """Start the ranks and wait for all; return the exit status, or become the launcher that does so.

        Args:
            argv: script and arguments, as in `sys.argv`.

        Raises:
            LaunchError: a host does not answer, or the launcher is not installed.
        """
        if self._pool is None:
            return run_with_restarts(lambda number, heard: self._run_here(argv, number, heard), self._restarts)
        starter = starter_of(self._config)
        command = start_command(self._config, self._pool, argv, os.environ) if starter != "ssh" else []
        leaves_out = starter == "ssh" and self._config.reliability.elastic
        if starter != "slurm" and not self._config.launch.no_ssh_check and not leaves_out:
            check_reachable(self._pool)
        if self._config.launch.preflight and not self._is_fit():
            return EXIT_NO_GO
        if command:
            _become(command)
        return run_with_restarts(RunOverSsh(self._config, self._hosts, argv, os.environ).attempt, self._restarts)

    def _run_here(self, argv: Sequence[str], number: int, heard: list[int]) -> int:
        environ = os.environ | {RESTARTS: str(times_restarted(os.environ) + number)}
        return run_local(argv, workers=self._workers, environ=environ, node=self._node, heard=heard)

    def _is_fit(self) -> bool:
        from neox.launch.preflight import check_hosts  # rich, for a table that few runs ask for

        return check_hosts(hostfile_path(self._config, os.environ), self._config)


def _become(command: list[str]) -> NoReturn:
    """Go on as another program, so that every signal is its own: it knows how to end what it started elsewhere."""
    results.hand_over()
    sys.stderr.flush()
    os.execvp(command[0], command)
