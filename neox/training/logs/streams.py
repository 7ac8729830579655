"""Standard output and error of a worker, with copies in files."""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from neox.training.logs.files import Copy
from neox.training.logs.once import Once


class CopiedStream:
    """A text stream that also goes to files.

    Attributes:
        terminal: the stream it stands in for.
        copy: a stream to the files alone.

    Args:
        terminal: the stream.
        copies: the files.
        show: writes to the terminal what is to be seen there; default: everything.
    """

    def __init__(self, terminal: TextIO, copies: Sequence[Copy], show: Callable[[str], object] | None = None) -> None:
        self.terminal = terminal
        self.copy = _Copies(copies)
        self._show = show or terminal.write

    def write(self, text: str) -> int:
        """Write to both, to the terminal first: files may lie on storage that hangs.

        A terminal that fails, or a pipe that nobody reads any more, ends nothing, as there are the files: Ctrl-C ends
        the `tee` behind a run too, which has its last checkpoint still to write.
        """
        with suppress(OSError):
            self._show(text)
        return self.copy.write(text)

    def flush(self) -> None:
        """Flush the terminal; files have nothing to flush."""
        with suppress(OSError):
            self.terminal.flush()

    def __getattr__(self, name: str) -> Any:
        # Whether it is a terminal, its encoding, its number: as without the copies.
        return getattr(self.terminal, name)


class _Copies:
    """Files as a stream."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = copies

    def write(self, text: str) -> int:
        for copy in self._copies:
            copy.write(text)
        return len(text)

    def flush(self) -> None:
        """Nothing waits but unfinished lines."""


class OneOfMany:
    """Shows on the terminal that many ranks share what one of them writes.

    What the first rank says is shown; what another says with its number, unless a rank of this host said the same
    before. What comes in one piece up to the end of a line is shown or not as a whole, so that a report stays together,
    and a line of a traceback is always shown.
    """

    def __init__(self, terminal: TextIO, rank: int, once: Once) -> None:
        self._terminal = terminal
        self._rank = rank
        self._once = once
        self._waiting = ""
        # Entered again by a signal handler that prints while its thread does.
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._renew)

    def __call__(self, text: str) -> None:
        """Show it; of other ranks than the first as soon as its last line is complete."""
        if self._rank == 0:
            self._terminal.write(text)
        with self._lock:
            self._waiting += text
            if not self._waiting.endswith("\n"):
                return
            piece, self._waiting = self._waiting, ""
        if not piece.strip():
            return
        in_traceback = piece.startswith((" ", "Traceback (most recent call last)"))
        is_new = self._once.is_first(piece)
        if self._rank != 0 and (is_new or in_traceback):
            self._terminal.write("".join(f"[rank {self._rank}] {line}" for line in piece.splitlines(keepends=True)))
            self._terminal.flush()

    def _renew(self) -> None:
        self._lock = threading.RLock()  # another thread may have held it at the fork


def beside_copy(stream: TextIO) -> TextIO:
    """The stream itself, without the copies: for a progress bar, which would fill a file with its redrawing."""
    return stream.terminal if isinstance(stream, CopiedStream) else stream
