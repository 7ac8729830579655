"""A rank's side of the watch: sends signs of life, answers where the rank stands, and ends it when told."""

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from neox import results
from neox.errors import UserError
from neox.launch.endings import EXIT_LOST
from neox.watch import signs
from neox.watch.report import own_lines
from neox.watch.wire import LONGEST, Message, encode, keep_from_children, receive

_LONGEST_REASON = 500
_SECONDS_TO_PRINT = 3.0
_SECONDS_BETWEEN_CALLS = 0.3


@dataclass(frozen=True)
class Post:
    """Where this rank watches, and where rank 0 is reached.

    Attributes:
        rank: number of this rank.
        addresses: of rank 0, to be tried in turn.
        port: there.
        token: what proves that this process belongs to the run.
        timeout: seconds without a sign of the other side after which it is lost.
        interval: seconds between signs.
        shows_stack: whether this rank prints its stack if rank 0 is lost; one on every host does.
    """

    rank: int
    addresses: tuple[str, ...]
    port: int
    token: str
    timeout: float
    interval: float
    shows_stack: bool


class Client:
    """Sends signs of life, and takes the order to end. To be used by one thread, that of its event loop."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._idleness = signs.Idleness(post.interval)
        self._heard = self._ticked = time.monotonic()
        self._writer: asyncio.StreamWriter | None = None
        self._farewell: bytes | None = None
        self._failure: Message | None = None
        self._is_judged = False

    async def run(self) -> None:
        """Watch until the connection ends, which it does when this rank leaves, or has failed and all is told."""
        connection = await self._connect()
        if connection is None:
            where = f"{' or '.join(self._post.addresses)}, port {self._post.port}"
            self._lost(f"cannot reach rank 0 at {where}, where it listens for the other ranks' signs of life")
            return
        reader, self._writer = connection
        self._write(self._greeting())
        self._heard = time.monotonic()
        self._say_farewell()
        signing = asyncio.create_task(self._sign())
        while (message := await receive(reader)) is not None:
            self._heard = time.monotonic()
            self._obey(message)
        signing.cancel()
        self._writer.close()
        # Rank 0 hangs up when all have left or failed; but it owes a verdict to those whose collectives failed.
        if self._farewell is None or (self._is_broken() and not self._is_judged):
            self._lost("rank 0 is gone: its process ended without a word (killed, out of memory, or crashed)")

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        deadline = time.monotonic() + self._post.timeout
        while time.monotonic() < deadline:
            for address in self._post.addresses:
                with contextlib.suppress(OSError, TimeoutError):
                    calling = asyncio.open_connection(address, self._post.port, limit=LONGEST)
                    reader, writer = await asyncio.wait_for(calling, min(5.0, self._post.timeout))
                    keep_from_children(writer)
                    return reader, writer
            await asyncio.sleep(_SECONDS_BETWEEN_CALLS)
        return None

    def _greeting(self) -> bytes:
        post = self._post
        return encode("greeting", token=post.token, rank=post.rank, host=signs.host(), process=os.getpid())

    async def _sign(self) -> None:
        while True:
            now = time.monotonic()
            if now - self._ticked > 4 * self._post.interval + 1.0:  # stopped, and with it perhaps all others
                self._heard = now
            self._ticked = now
            if now - self._heard > self._post.timeout:
                seconds = f"{now - self._heard:.1f} s"
                self._lost(f"rank 0 has not answered for {seconds}: its link is cut, or it stands still")
            self._write(encode("sign", **signs.glance(self._idleness.look())))
            await asyncio.sleep(self._post.interval)

    def _write(self, message: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(message)

    def _obey(self, message: Message) -> None:
        if message["kind"] == "ask":
            self._write(encode("standing", **self._standing()))
        elif message["kind"] == "end":
            if self._failure is None or (self._is_broken() and self._post.rank not in message["culprits"]):
                end_now(message["status"])
            self._is_judged = True
            if self._writer is not None:
                self._writer.close()

    def _is_broken(self) -> bool:
        return self._failure is not None and self._failure["kind"] == "broken"

    def _standing(self) -> Message:
        return signs.standing(self._idleness.look()) if self._failure is None else self._failure["standing"]

    def _lost(self, what: str) -> None:
        """Rank 0, which gives verdicts, is not there: say so, and end."""
        who = f"rank {self._post.rank} (host {signs.host()}, process {os.getpid()}): {what}"
        say("\n".join([who, *own_lines(self._standing(), with_stack=self._post.shows_stack)]))
        end_now()

    def leave(self) -> None:
        """Say that this rank has done its work."""
        self._farewell = encode("left")
        self._say_farewell()

    def fail(self, kind: str, error: BaseException) -> None:
        """Say that this rank has failed; the order to end then does not end it if it is its own fault.

        Args:
            kind: "failed" for a reason of its own, "broken" in a collective.
            error: the exception.
        """
        what = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        standing = signs.standing(self._idleness.look(), error.__traceback__)
        # A mistake is one for all ranks: who starts the run again would only meet it again.
        status = UserError.exit_status if getattr(error, "exit_status", None) == UserError.exit_status else EXIT_LOST
        self._failure = {"kind": kind, "what": what, "status": status, "standing": standing}
        self._farewell = encode(**self._failure)
        self._say_farewell()

    def _say_farewell(self) -> None:
        """Send it, now or as soon as there is a connection."""
        if self._farewell is not None and self._writer is not None:
            self._write(self._farewell)
            if self._failure is None:
                self._writer.close()


def say(text: str) -> None:
    """Print to stderr as one piece; a terminal or a log file that fails or hangs does not hold up the watch."""

    def show() -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"{text}\n", end="", file=sys.stderr, flush=True)

    _for_a_moment(show)


def end_now(status: int = EXIT_LOST) -> NoReturn:
    """End this process, whatever its main thread hangs in."""

    def flush() -> None:
        for stream in (results.stream(), sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

    _for_a_moment(flush)
    os._exit(status)


def _for_a_moment(function: Callable[[], None]) -> None:
    """Do what may hang: the main thread may hang in a write itself, and hold the stream."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_PRINT)
