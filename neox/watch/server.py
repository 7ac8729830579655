"""Rank 0's side of the watch: hears every rank, notices who is lost or stalls, prints one report and ends the run."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from neox.launch.endings import EXIT_LOST
from neox.watch.report import places, ranks
from neox.watch.verdict import holding_up
from neox.watch.wire import Message, encode, keep_from_children, receive

SECONDS_TO_SETTLE = 1.5
"""From the first sign of trouble to the verdict: others may have the same trouble, or the cause of it."""

SECONDS_TO_ANSWER = 4.0
"""In which a rank says where it stands."""

_SECONDS_TO_GREET = 10.0


@dataclass
class Peer:
    """A rank as the server knows it.

    Attributes:
        rank: number.
        name: `rank 3 (host n1, process 77)`.
        heard: `time.monotonic()` of its last message.
        ended: the same, of its end or failure.
        sign: its last heartbeat.
        standing: its last answer to the question where it stands.
        state: running; left, as it should; failed, by an exception of its own; broken, by a collective's; died;
            silent.
        what: the exception.
        status: with which the others end if they end because of it.
        writer: its connection.
    """

    rank: int
    name: str
    heard: float
    ended: float = 0.0
    sign: Message = field(default_factory=dict)
    standing: Message | None = None
    state: str = "running"
    what: str = ""
    status: int = EXIT_LOST
    writer: asyncio.StreamWriter | None = None

    def send(self, message: bytes) -> None:
        """Write if it is there to read."""
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(message)


class Server:
    """Watches `size` ranks until all have left, or gives a verdict.

    Args:
        size: number of ranks.
        token: what a rank must know.
        timeout: seconds without a heartbeat, or without progress, after which a rank is lost.
        interval: seconds between heartbeats.
        say: prints text.
    """

    def __init__(self, *, size: int, token: str, timeout: float, interval: float, say: Callable[[str], None]) -> None:
        self._token, self._timeout, self._interval, self._say = token, timeout, interval, say
        now = time.monotonic()
        self._peers = [Peer(rank, ranks([rank]), now) for rank in range(size)]
        self._changed = asyncio.Event()
        self._next_look = now
        self._looked = now

    async def run(self) -> None:
        """Watch until nobody is left, or a verdict is given and sent."""
        while any(peer.state == "running" for peer in self._peers):
            self._changed.clear()
            verdict = await self._verdict()
            if verdict is not None:
                await self._end(*verdict)
                return
            if not self._changed.is_set():
                await _within(self._changed.wait(), self._interval / 2)

    def hang_up(self) -> None:
        """Close all connections."""
        for peer in self._peers:
            if peer.writer is not None:
                peer.writer.close()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk with one rank until its connection ends, or the watch does."""
        with contextlib.suppress(asyncio.CancelledError):
            peer = await self._greet(reader, writer)
            if peer is not None:
                await self._listen(peer, reader)
        writer.close()

    async def _listen(self, peer: Peer, reader: asyncio.StreamReader) -> None:
        while (message := await receive(reader)) is not None:
            peer.heard = time.monotonic()
            self._take(peer, message)
        if peer.state == "running":
            peer.state, peer.ended, peer.standing = "died", time.monotonic(), None
        peer.writer = None
        self._changed.set()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Peer | None:
        message = await _within(receive(reader), _SECONDS_TO_GREET)
        if message is None or not hmac.compare_digest(str(message.get("token")).encode(), self._token.encode()):
            return None
        keep_from_children(writer)
        peer = self._peers[int(message["rank"])]
        peer.name = f"rank {peer.rank} (host {message['host']}, process {message['process']})"
        peer.writer, peer.heard = writer, time.monotonic()
        return peer

    def _take(self, peer: Peer, message: Message) -> None:
        kind = message["kind"]
        if kind == "sign":
            peer.sign = message
            peer.send(encode("sign"))
        elif kind == "standing":
            peer.standing = peer.sign = message
            self._changed.set()
        elif kind in ("left", "failed", "broken") and peer.state == "running":
            peer.state, peer.what, peer.ended = kind, str(message.get("what", "")), peer.heard
            peer.standing = message.get("standing", peer.standing)
            peer.status = message.get("status", EXIT_LOST)
            self._changed.set()

    async def _verdict(self) -> tuple[str, list[int]] | None:
        """Who is to blame, in words and by number; None while all is well."""
        self._forgive_a_pause()
        if any(peer.state in ("died", "failed", "broken") for peer in self._peers):
            return await self._of_the_ended()
        silent = self._silent(self._timeout)
        if silent:
            return self._of_the_silent(silent)
        now = time.monotonic()
        if now >= self._next_look and any(self._idle(peer) >= self._timeout for peer in self._peers):
            self._next_look = now + self._timeout / 4
            return await self._of_the_idle()
        return None

    def _forgive_a_pause(self) -> None:
        """Where this process itself was stopped, nobody else is to blame for not having been heard."""
        now = time.monotonic()
        pause = now - self._looked - SECONDS_TO_SETTLE - SECONDS_TO_ANSWER - self._interval
        self._looked = now
        if pause > 0:
            for peer in self._peers:
                peer.heard = now

    def _idle(self, peer: Peer) -> float:
        return float(peer.sign.get("idle", 0.0)) if peer.state == "running" else 0.0

    def _silent(self, seconds: float) -> list[Peer]:
        now = time.monotonic()
        return [peer for peer in self._peers if peer.state == "running" and now - peer.heard > seconds]

    async def _of_the_ended(self) -> tuple[str, list[int]] | None:
        """Some ended, or failed, or only their collectives did, which then have no cause that is known."""
        if not self._in_state("died"):
            await self._settle()
        causes = self._in_state("died", "failed") or self._in_state("broken")[:1]
        if not self._in_state("died", "running", "broken"):
            return None  # each tells its own failure
        return "\n".join(_ENDED[peer.state].format(peer.name, peer.what) for peer in causes), _numbers(causes)

    def _in_state(self, *states: str) -> list[Peer]:
        """Ranks in one of these states, in the order in which they came to it."""
        return sorted((peer for peer in self._peers if peer.state in states), key=lambda peer: peer.ended)

    async def _settle(self) -> None:
        """Give the others time to fail likewise, or the one to be noticed that broke their collectives."""
        deadline = time.monotonic() + SECONDS_TO_SETTLE
        while time.monotonic() < deadline and self._in_state("running", "broken") and not self._in_state("died"):
            self._changed.clear()
            await _within(self._changed.wait(), deadline - time.monotonic())

    def _of_the_silent(self, silent: list[Peer]) -> tuple[str, list[int]]:
        # A host's ranks were last heard of at slightly different times.
        silent = self._silent(self._timeout - 2 * self._interval) or silent
        words = "{} has not answered for {:.1f} s: its link is cut, or its machine or process stands still"
        now = time.monotonic()
        for peer in silent:
            peer.state = "silent"
        return "\n".join(words.format(peer.name, now - peer.heard) for peer in silent), _numbers(silent)

    async def _of_the_idle(self) -> tuple[str, list[int]] | None:
        """Some do not get on; who holds them up may work."""
        await self._ask()
        silent = [peer for peer in self._silent(SECONDS_TO_ANSWER * 0.9) if peer.standing is None]
        if silent:
            for peer in silent:
                peer.state = "silent"
            words = "{} does not answer, and the others wait"
            return "\n".join(words.format(peer.name) for peer in silent), _numbers(silent)
        standings = {peer.rank: peer.standing for peer in self._peers if peer.standing and peer.state == "running"}
        culprits = [self._peers[rank] for rank in holding_up(standings)]
        if culprits and all(self._idle(peer) >= self._timeout for peer in culprits):
            words = "{} has not got on for {:.1f} s, and the others wait for it"
            if len(self._peers) == 1:
                words = "{} has not got on for {:.1f} s"
            return "\n".join(words.format(peer.name, self._idle(peer)) for peer in culprits), _numbers(culprits)
        running = [peer for peer in self._peers if peer.state == "running"]
        if not culprits and running and all(self._idle(peer) >= self._timeout for peer in running):
            least = min(self._idle(peer) for peer in running)
            return f"no rank has got on for {least:.1f} s, and none is behind the others", _numbers(running)
        return None

    async def _ask(self) -> None:
        """Ask all that can answer where they stand, and wait for the answers."""
        asked = [peer for peer in self._peers if peer.state == "running" and peer.writer is not None]
        for peer in asked:
            peer.standing = None
            peer.send(encode("ask"))
        deadline = time.monotonic() + SECONDS_TO_ANSWER
        while time.monotonic() < deadline and any(p.standing is None and p.state == "running" for p in asked):
            self._changed.clear()
            await _within(self._changed.wait(), deadline - time.monotonic())

    async def _end(self, headline: str, culprits: list[int]) -> None:
        """Print the report and have everyone end, this process last."""
        self._say(headline)
        if not all(self._peers[rank].state == "failed" for rank in culprits):  # which tells where it stood itself
            await self._ask()
            others = [peer for peer in self._in_state("died") if peer.rank not in culprits]
            self._say("\n".join([*(f"{peer.name} went too" for peer in others), *self._places()]))
        order = encode("end", culprits=culprits, status=self._peers[culprits[0]].status)
        for peer in self._peers[1:]:
            peer.send(order)
        writers = [peer.writer for peer in self._peers if peer.writer is not None]
        await _within(asyncio.gather(*(writer.drain() for writer in writers), return_exceptions=True), 1.0)
        self._peers[0].send(order)

    def _places(self) -> list[str]:
        now, there = time.monotonic(), [peer for peer in self._peers if peer.state != "left"]
        answered = {peer.rank: peer.standing for peer in there if peer.standing is not None}
        return places(answered, {p.rank: p.sign | {"ago": now - p.heard} for p in there if p.standing is None})


_ENDED = {
    "died": "{0} is gone: its process ended without a word (killed, out of memory, or crashed)",
    "failed": "{0} failed, and the others end with it: {1}",
    "broken": "a collective of {0} failed, though no process is lost: {1}",
}


def _numbers(peers: list[Peer]) -> list[int]:
    return [peer.rank for peer in peers]


async def _within(awaitable: Any, seconds: float) -> Any:
    """The result, or None if it does not come in time."""
    try:
        return await asyncio.wait_for(awaitable, max(seconds, 0.0))
    except TimeoutError:
        return None
