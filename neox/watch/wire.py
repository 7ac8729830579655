"""Messages between a run's processes: one JSON object a line over TCP, never anything that could be executed."""

import asyncio
import functools
import json
import os
import socket
from typing import Any, Protocol

Message = dict[str, Any]

LONGEST = 1 << 22
"""Bytes of a line: the stacks and collectives of one process are some thousand."""


def encode(kind: str, **fields: Any) -> bytes:
    """One message."""
    return json.dumps({"kind": kind, **fields}, separators=(",", ":")).encode() + b"\n"


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """The next message; None at the end of the connection, or after something that is none."""
    try:
        message = json.loads(await reader.readuntil(b"\n"))
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return None
    return message if isinstance(message, dict) and isinstance(message.get("kind"), str) else None


class _Socket(Protocol):
    def fileno(self) -> int:
        """The number of the file; -1 once it is closed."""


_kept: list[_Socket] = []
"""Connections of this process, and some that are closed already."""


def keep_from_children(connection: asyncio.StreamWriter | _Socket) -> None:
    """Do not let processes forked from this one, data loaders say, hold a connection open after its end."""
    _watch_forks()
    held = connection.get_extra_info("socket") if isinstance(connection, asyncio.StreamWriter) else connection
    _kept[:] = [held, *(other for other in _kept if other.fileno() >= 0)]


def _let_go() -> None:
    # Not closed: objects of the parent that know the number may close it again, when it belongs to something else.
    nothing = os.open(os.devnull, os.O_RDWR)
    for connection in _kept:
        if connection.fileno() >= 0:
            os.dup2(nothing, connection.fileno())
    _kept.clear()
    os.close(nothing)


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_let_go)


def listening_socket(*, local: bool) -> socket.socket:
    """A socket on a free port, of every network or of this machine only."""
    if local:
        return socket.create_server(("127.0.0.1", 0), backlog=4096)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def own_address(towards: str) -> str:
    """The address from which this machine talks to another; that one's name if it cannot be told."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return towards
