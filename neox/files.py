"""Files that are whole or not there, and on the disk when we say so."""

import os
from pathlib import Path

from neox.errors import UserError
from neox.pulse import pulse


def flush(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriteBehind:
    """Has a large file written to disk while more of it is coming, and lets go of what has been.

    Otherwise the file fills the page cache, and its writer waits for pages that must first be found free: on a busy
    machine 2.7 GB took 8 to 18 s, and 2 s this way.

    Args:
        descriptor: of the file, open in whatever mode.
    """

    STEP = 32 * 2**20
    """Bytes after which the system is told."""

    LARGE = 2**30
    """Bytes after which they are waited for: all at the end may take longer than a process may seem to stand still."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting = self._unsafe = 0

    def wrote(self, count: int) -> None:
        """Note that so many more bytes were written; mostly returns at once."""
        self._waiting += count
        self._unsafe += count
        if self._unsafe >= self.LARGE:
            os.fsync(self._descriptor)
            pulse()
            self._unsafe = 0
        if self._waiting >= self.STEP and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._waiting = 0


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and move it there, so that no reader and no crash sees a part of it.

    Raises:
        UserError: the folder cannot be written; caused by the OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8")
            flush(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
