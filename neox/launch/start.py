"""What a script that no launcher started does: start its ranks here, or hand over to what starts them elsewhere."""

import os
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neox.launch.hostfile import Pool, hostfile_path
from neox.launch.hosts import (
    carried_variables,
    chosen_hosts,
    master_address,
    start_command,
    starter_of,
    wants_launcher,
)
from neox.launch.local import run_local
from neox.launch.node import NODE_RANK, SLOTS, Node, detect_node
from neox.launch.ssh import check_reachable, remote_command, run_everywhere

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

    def __init__(self, config: "Config", *, workers: int) -> None:
        """Find where the ranks will run.

        Args:
            config: hosts and launcher of its launch section.
            workers: processes for this machine, where nothing else says how many.

        Raises:
            LaunchError: the hostfile is wrong, or chooses what is not there.
        """
        self._config = config
        self._node: Node | None = detect_node(os.environ)
        self._pool: Pool | None = None
        if self._node is None and wants_launcher(config):
            self._pool = chosen_hosts(config, os.environ)
        self._workers = self._node.workers(workers) if self._node else workers
        self.world_size = self._count()
        self.description = self._describe()
        """What was found, in one line; empty where there is nothing to tell."""

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
        return self._pool is None and self.world_size == 1

    @property
    def speaks(self) -> bool:
        """Whether this process, among those that start ranks, is the one that prints."""
        return self._node is None or self._node.rank == 0

    def run(self, argv: Sequence[str]) -> int:
        """Start the ranks and wait for all; return the exit status.

        Args:
            argv: script and arguments, as in `sys.argv`.

        Raises:
            LaunchError: a host does not answer, or the launcher is not installed.
        """
        if self._pool is None:
            return run_local(argv, workers=self._workers, environ=os.environ, node=self._node)
        starter = starter_of(self._config)
        command = start_command(self._config, self._pool, argv, os.environ) if starter != "ssh" else []
        if starter != "slurm" and not self._config.launch.no_ssh_check:
            check_reachable(self._pool)
        if self._config.launch.preflight and not self._is_fit():
            return EXIT_NO_GO
        return subprocess.call(command) if command else self._run_over_ssh(self._pool, argv)

    def _is_fit(self) -> bool:
        from neox.launch.preflight import check_hosts  # rich, for a table that few runs ask for

        return check_hosts(hostfile_path(self._config, os.environ), self._config)

    def _run_over_ssh(self, pool: Pool, argv: Sequence[str]) -> int:
        shared = carried_variables(os.environ) | {
            "MASTER_ADDR": master_address(self._config, os.environ) or next(iter(pool)),
            "MASTER_PORT": str(self._config.launch.master_port),
            SLOTS: ",".join(str(len(slots)) for slots in pool.values()),
        }
        script = [os.path.abspath(argv[0]), *argv[1:]]
        commands = {}
        for rank, (host, slots) in enumerate(pool.items()):
            own = {NODE_RANK: str(rank), "CUDA_VISIBLE_DEVICES": ",".join(map(str, slots))}
            commands[host] = remote_command(["-u", *script], shared | own)
        return run_everywhere(commands)
