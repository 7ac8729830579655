"""Files of what one rank prints, and of what the workers of a host print.

Neither may end a run: while a file cannot be written its lines are lost, which the terminal is told once.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from neox.patience import is_mistake

if TYPE_CHECKING:
    from neox.checkpoint.native.manifest import Progress
    from neox.training.loop import Step

Tell = Callable[[str], object]


class Copy(Protocol):
    """A place for a copy of what is printed."""

    def write(self, text: str) -> None:
        """Take over text, which may be part of a line."""

    def close(self) -> None:
        """Write what is left and let go of the file."""


class _Standing:
    """Where this process stands: steps of the run that are done, None before the first is begun."""

    step: int | None = None


_standing = _Standing()


class NoteStep:
    """A callback that has the lines of the log say after how many steps they were printed."""

    def before_training(self, progress: "Progress") -> None:
        """Begin where the run begins."""
        _standing.step = progress.iteration

    def after_step(self, step: "Step") -> None:
        """Count."""
        _standing.step = step.progress.iteration


class AppendedFile:
    """A file that is appended to and never waited for: what cannot be written is lost, and said once.

    Args:
        path: the file; its folder is made.
        tell: says a line on the terminal.
        most_bytes: length at which another file is begun; 0 for none.
        earlier: number of files before it that are kept, as `<path>.1` and so on, `.1` the newest.

    Raises:
        OSError: it is not ours to write. Storage that fails may work later.
    """

    def __init__(self, path: Path, tell: Tell, *, most_bytes: int = 0, earlier: int = 0) -> None:
        self.path = path
        self._tell = tell
        self._most_bytes = most_bytes
        self._earlier = earlier
        self._process = os.getpid()
        self._is_failing = self._is_torn = False
        self._descriptor = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open()
        except OSError as error:
            if is_mistake(error):
                raise
            self._fail(error)

    def append(self, text: str) -> None:
        """Hand text to the system at once, so that a crash loses none."""
        data = (b"\n" if self._is_torn else b"") + text.encode("utf-8", "backslashreplace")
        try:
            if self._descriptor < 0:
                self._descriptor = self._open()
            self._make_room(len(data))
            while data:  # a disk that becomes full takes a part
                data = data[os.write(self._descriptor, data) :]
                self._is_torn = bool(data)
        except OSError as error:
            self.close()  # a folder that is mounted anew wants a new descriptor
            self._fail(error)
        else:
            if self._is_failing:
                self._tell(f"{self.path}: can be written again\n")
            self._is_failing = False

    def _fail(self, error: OSError) -> None:
        if not self._is_failing:
            self._tell(f"{self.path}: cannot be written ({error.strerror}); its lines are lost until it can\n")
        self._is_failing = True

    def close(self) -> None:
        """Let go of the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _make_room(self, more: int) -> None:
        # A forked loader worker only appends: its parent would go on writing to a file that it renamed.
        if not self._most_bytes or os.getpid() != self._process:
            return
        size = os.fstat(self._descriptor).st_size
        if not size or size + more <= self._most_bytes:
            return
        for number in range(self._earlier - 1, -1, -1):
            with contextlib.suppress(FileNotFoundError):
                self._numbered(number).replace(self._numbered(number + 1))
        if not self._earlier:
            self.path.unlink(missing_ok=True)
        self.close()
        self._descriptor = self._open()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path


class HostFile:
    """A file to which all workers of a host append what they print, line by line."""

    def __init__(self, file: AppendedFile) -> None:
        self._file = file
        self._lines = _Lines(self._append)

    def write(self, text: str) -> None:
        """Write whole lines, keep the rest."""
        self._lines.add(text)

    def close(self) -> None:
        """Write what is left."""
        self._lines.end()
        self._file.close()

    def _append(self, line: str) -> None:
        self._file.append(line + "\n")


class RankFile(HostFile):
    """A file of one rank, with time, rank and step before each line."""

    def __init__(self, file: AppendedFile, rank: int) -> None:
        super().__init__(file)
        self._rank = rank

    def _append(self, line: str) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        step = "-" if _standing.step is None else _standing.step
        shown = line.rstrip("\r").rpartition("\r")[2]  # of a line that was drawn over, what it came to
        super()._append(f"{now} rank {self._rank} step {step} | {shown}")


class _Lines:
    """Makes lines of what comes in pieces, from several threads."""

    def __init__(self, take: Callable[[str], object]) -> None:
        self._take = take
        self._unfinished = ""
        # Entered again by a signal handler that prints while its thread does.
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._renew)

    def add(self, text: str) -> None:
        with self._lock:
            *lines, self._unfinished = (self._unfinished + text).split("\n")
            for line in lines:
                self._take(line)

    def end(self) -> None:
        if self._unfinished:
            self.add("\n")

    def _renew(self) -> None:
        self._lock = threading.RLock()  # another thread may have held it at the fork
