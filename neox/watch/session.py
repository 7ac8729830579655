"""The watch over a run, from the moment the processes have met to its end."""

import asyncio
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from neox.config import Config
from neox.parallel.collectives import raised_by_collective
from neox.parallel.rendezvous import wait_long
from neox.watch import signs
from neox.watch.client import Client, Post, end_now, say
from neox.watch.server import SECONDS_TO_ANSWER, SECONDS_TO_SETTLE, Server
from neox.watch.wire import LONGEST, keep_from_children, listening_socket, own_address

_LONGEST_INTERVAL = 5.0
_SECONDS_FOR_A_VERDICT = 2 * (SECONDS_TO_SETTLE + SECONDS_TO_ANSWER)


@contextmanager
def watched(config: Config) -> Iterator["Watch"]:
    """Watch all processes of a run for the length of a `with`.

    A rank that dies, or is silent or idle for `distributed_timeout`, is named by rank 0, with where every rank stood,
    and every process ends with status 3. So do the others where the block raises on one rank, with 2 after a user's
    mistake; where a collective raised because another rank was lost, this process ends likewise, and without its
    traceback.
    """
    watch = Watch(config.reliability.distributed_timeout)
    try:
        yield watch
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            watch.leave()
        else:
            watch.fail(error)
        raise
    watch.leave()


class Watch:
    """The thread that watches; of rank 0 also the server that hears all ranks.

    Args:
        timeout: `distributed_timeout`.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._local_rank = int(os.environ.get("LOCAL_RANK", "0"))  # before a mesh makes it the number of a GPU
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._client: Client | None = None

    def begin(self) -> None:
        """Start watching; a collective over all ranks, once they have met."""
        signs.begin()
        rank, interval = dist.get_rank(), min(_LONGEST_INTERVAL, self._timeout / 10)
        is_local = os.environ.get("LOCAL_WORLD_SIZE") == str(dist.get_world_size())
        listening = listening_socket(local=is_local) if rank == 0 else None
        addresses, port, token = _shared_place(listening, is_local=is_local)
        shows_stack = self._local_rank == 0 or rank == 1
        self._client = Client(Post(rank, addresses, port, token, self._timeout, interval, shows_stack))
        server = None
        if listening is not None:
            keep_from_children(listening)
            size = dist.get_world_size()
            server = Server(size=size, token=token, timeout=self._timeout, interval=interval, say=say)
        self._thread = threading.Thread(target=self._run, args=(server, listening), name="watch", daemon=True)
        self._thread.start()
        wait_long()

    def leave(self) -> None:
        """Stop watching this rank, which has done its work; rank 0 waits until all have."""
        if self._client is not None:
            self._tell(self._client.leave)
            self._join(None)

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank fails; does not return if it is another one's fault."""
        if self._client is None:
            return
        kind = "broken" if raised_by_collective(error) else "failed"
        self._tell(self._client.fail, kind, error)
        self._join(_SECONDS_FOR_A_VERDICT)

    def _tell(self, function: Callable[..., object], *args: Any) -> None:
        self._loop.call_soon_threadsafe(function, *args)

    def _join(self, seconds: float | None) -> None:
        assert self._thread is not None, "the watch has begun"
        self._thread.join(seconds)

    def _run(self, server: Server | None, listening: socket.socket | None) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._watch(server, listening))
        except Exception as error:
            # The others notice the end of the connection, and end; this one must not wait for them unwatched.
            say(f"the watch of rank {os.environ['RANK']} failed: {type(error).__name__}: {error}")
            end_now()

    async def _watch(self, server: Server | None, listening: socket.socket | None) -> None:
        assert self._client is not None, "the watch has begun"
        if server is None:
            await self._client.run()
            return
        accepting = await asyncio.start_server(server.accept, sock=listening, limit=LONGEST)
        client = asyncio.create_task(self._client.run())
        await server.run()
        accepting.close()
        server.hang_up()
        await client


def _shared_place(listening: socket.socket | None, *, is_local: bool) -> tuple[tuple[str, ...], int, str]:
    """Addresses and port at which rank 0 listens, and a token that the run's processes alone know."""
    box: list[Any] = [None]
    if listening is not None:
        master = os.environ["MASTER_ADDR"]
        addresses = ("127.0.0.1",) if is_local else tuple(dict.fromkeys((own_address(master), master)))
        box = [(addresses, listening.getsockname()[1], secrets.token_hex(16))]
    dist.broadcast_object_list(box, src=0)
    addresses, port, token = box[0]
    return tuple(addresses), port, token
