"""The place where processes meet: looked at before torch does, which waits for minutes and then prints pages."""

import errno
import os
import socket
import time
from collections.abc import MutableMapping

from neox.errors import LaunchError
from neox.launch.environment import Placement, export
from neox.launch.node import IN_A_POD

_SECONDS_FOR_NAMES = 600.0
"""A pod gets its name when it is placed, which may be after this one."""

_POLL_SECONDS = 2.0


class _Self:
    """What this process has become."""

    is_rank = False


def is_rank() -> bool:
    """Whether this process has become a rank (`enter`): what it meets from then on may not be a user's mistake."""
    return _Self.is_rank


def enter(placement: Placement, environ: MutableMapping[str, str] | None = None) -> None:
    """Become a rank: check that its meeting place can be one, and set the variables that torch reads.

    Raises:
        LaunchError: the address has no meaning here, or another program has the port.
    """
    environ = os.environ if environ is None else environ
    if placement.world_size > 1:
        check_address(placement.master_addr, patience=_SECONDS_FOR_NAMES if IN_A_POD in environ else 0.0)
        # torchrun itself serves the meeting, so its port is in use.
        served = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if placement.rank == 0 and not served:
            check_port(placement.master_port)
    export(placement, environ)
    _Self.is_rank = True


def check_address(host: str, *, patience: float = 0.0) -> None:
    """Look the meeting host up.

    Args:
        host: name or address.
        patience: seconds in which the name may still come to be.

    Raises:
        LaunchError: its name is unknown on this machine.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:
            if time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                continue
            here = socket.gethostname()
            raise LaunchError(f"master_addr: {host!r} is unknown on {here} ({error}); give a name or address") from None
        return


def check_port(port: int) -> None:
    """Take the port for a moment.

    Raises:
        LaunchError: another program of this machine has it, or it is not ours to take.
    """
    with socket.socket(socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            known = {errno.EADDRINUSE: "is in use", errno.EACCES: "is reserved"}
            reason = known.get(error.errno or 0, f"cannot be used ({error.strerror})")
            where = f"{port} {reason} on {socket.gethostname()}"
            another = "MASTER_PORT, or the key master_port if train.py starts the hosts"
            raise LaunchError(f"master_port: {where}; set another ({another})") from None
