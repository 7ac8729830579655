"""The ranks of a run on the hosts of a file, over plain ssh, as often as they have to be started."""

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from neox.errors import ConfigError, LaunchError
from neox.launch.clock import STARTED, started
from neox.launch.conversation import Errand, Reply, converse
from neox.launch.hostfile import Pool
from neox.launch.hosts import carried_variables, master_address
from neox.launch.node import NODE_RANK, SLOTS
from neox.launch.reporting import tell
from neox.launch.restarts import pause, times_restarted
from neox.launch.ssh import remote_command, run_everywhere, silent_hosts
from neox.launch.sweep import RUN
from neox.launch.variables import RESTARTS

if TYPE_CHECKING:
    from neox.config import Config

_SECONDS_FOR_A_HOST = 600.0
"""In which a host that does not answer may come back before a restart is given up."""

_SECONDS_BETWEEN_CALLS = 10.0
_SECONDS_FOR_AN_ANSWER = 60.0


class RunOverSsh:
    """One run on the hosts of a pool.

    With `elastic` an attempt takes the hosts that answer, as many of them as the batch can be shared by.
    """

    def __init__(self, config: "Config", pool: Pool, argv: Sequence[str], environ: Mapping[str, str]) -> None:
        """Prepare attempts to start `python ARGV...` on the hosts of `pool`; nothing is started yet."""
        self._config = config
        self._pool = pool
        self._argv = [os.path.abspath(argv[0]), *argv[1:]]
        self._environ = environ
        self._run = secrets.token_hex(8)

    def attempt(self, number: int, heard: list[int]) -> int | None:
        """Start the ranks and wait for them, as `neox.launch.restarts.Attempt` has it."""
        pool, port = self._pool, self._config.launch.master_port
        if number:
            replies = self._call(heard)
            if replies is None or heard:
                return None
            pool = self.usable(replies)
            # The port of the attempt before may not be free yet.
            port = int(replies[next(iter(pool))].lines[-1])
        elif self._config.reliability.elastic and not self._config.launch.no_ssh_check:
            silent = silent_hosts(pool)
            _tell_left_out(silent)
            pool = self.usable(pool.keys() - silent.keys())
        return run_everywhere(self._commands(pool, port, number), heard)

    def usable(self, hosts: "Mapping[str, Reply] | set[str]") -> Pool:
        """The most of the hosts that the configuration can use: all of them, unless it is elastic."""
        pool = {host: slots for host, slots in self._pool.items() if host in hosts}
        return largest_usable(self._config, pool) if self._config.reliability.elastic else pool

    def _call(self, heard: list[int]) -> dict[str, Reply] | None:
        """End what is left of the run on every host; the answers, or None where too few came in time."""
        deadline = time.monotonic() + _SECONDS_FOR_A_HOST
        errand = Errand(["-m", "neox.launch.sweep", self._run], {})
        while True:
            replies = converse(dict.fromkeys(self._pool, errand), road="ssh", timeout=_SECONDS_FOR_AN_ANSWER)
            silent = {host: reply.reason for host, reply in replies.items() if reply.status != 0}
            answers = {host: reply for host, reply in replies.items() if host not in silent}
            if not silent or (self._config.reliability.elastic and self._is_enough(answers)):
                _tell_left_out(silent)
                return answers
            left = deadline - time.monotonic()
            named = "; ".join(f"{host} ({reason})" for host, reason in silent.items())
            if left <= 0:
                tell(f"no answer over ssh from {named} for {_SECONDS_FOR_A_HOST:.0f} s; not starting again")
                return None
            tell(f"waiting for {named}; for {left:.0f} s more")
            if not pause(min(left, _SECONDS_BETWEEN_CALLS), heard):
                return None

    def _is_enough(self, answers: Mapping[str, Reply]) -> bool:
        try:
            return bool(self.usable(answers))
        except (ConfigError, LaunchError):
            return False

    def _commands(self, pool: Pool, port: int, number: int) -> dict[str, list[str]]:
        first = next(iter(pool))
        # An address that the user gave is the first host's.
        given = master_address(self._config, self._environ) if first == next(iter(self._pool)) else None
        shared = carried_variables(self._environ) | {
            "MASTER_ADDR": given or first,
            "MASTER_PORT": str(port),
            SLOTS: ",".join(str(len(slots)) for slots in pool.values()),
            RUN: self._run,
            RESTARTS: str(times_restarted(self._environ) + number),
            STARTED: str(started(self._environ)),
        }
        commands = {}
        for rank, (host, slots) in enumerate(pool.items()):
            own = {NODE_RANK: str(rank), "CUDA_VISIBLE_DEVICES": ",".join(map(str, slots))}
            commands[host] = remote_command(["-u", *self._argv], shared | own)
        return commands


def largest_usable(config: "Config", pool: Pool) -> Pool:
    """The first hosts of a pool, as many as the layout and the batch can use.

    Raises:
        ConfigError: what is wrong with all of them, where no number works.
        LaunchError: there are none.
    """
    if not pool:
        raise LaunchError("hostfile: none of its hosts answers over ssh; `ssh HOST true` must work without a password")
    hosts = list(pool)
    first_error: ConfigError | None = None
    for count in range(len(hosts), 0, -1):
        chosen = {host: pool[host] for host in hosts[:count]}
        try:
            config.with_world_size(sum(map(len, chosen.values())))
        except ConfigError as error:
            first_error = first_error or error
        else:
            return chosen
    assert first_error is not None, "some number was tried"
    raise first_error


def _tell_left_out(silent: Mapping[str, str]) -> None:
    for host, reason in silent.items():
        tell(f"elastic: {host} is left out, it does not answer over ssh ({reason})")
