"""Files that are whole or not there, and on the disk when we say so."""

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from tempfile import TemporaryFile

from neox.errors import UserError
from neox.pulse import pulse


def flush(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_inside(name: str) -> bool:
    """Whether a name that stands in a file of a folder means a file of that folder."""
    path = PurePath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def absence(path: Path) -> str:
    """What to say of a path that no regular file is at."""
    if os.path.isdir(path):
        return "a folder, not a file; name a file"
    return "not a regular file; save what it gives to one" if os.path.exists(path) else "no such file; check the path"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file beside its place; when the block ends it is on the disk and moved there, to what a link means.

    No reader and no crash sees a part of it, and where the block fails nothing is left behind.

    Raises:
        OSError: it cannot be written, or there is a device or a pipe, which root would replace: /dev/null say.
    """
    place = path.resolve()
    if place.exists() and not (place.is_file() or place.is_dir()):
        raise OSError(errno.EINVAL, "it is no file", str(path))
    # In containers on two hosts processes often have the same number.
    temporary = place.with_name(f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
        flush(temporary)
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


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


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a text, as UTF-8, or bytes as a `whole_file`, with the folder that it is in.

    Raises:
        UserError: it cannot be written; caused by the OSError.
    """
    with _unwritable_named(path):
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def write_new(path: Path, text: str) -> Path:
    """`write_whole` under a name that nothing has: where something has it, with `-2`, `-3` and so on at its end.

    Returns:
        The file.

    Raises:
        UserError: it cannot be written; caused by the OSError.
    """
    place, number = path, 1
    with _unwritable_named(path):
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                place.open("x").close()  # so that of two processes one has it
                break
            except FileExistsError:
                number += 1
                place = path.with_stem(f"{path.stem}-{number}")
    try:
        write_whole(place, text)
    except BaseException:
        place.unlink(missing_ok=True)
        raise
    return place


def require_place(path: Path) -> None:
    """Check that `write_whole` can write a file, before the work whose result goes there; makes its folder.

    Raises:
        UserError: it cannot; caused by the OSError.
    """
    with _unwritable_named(path):
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is no file", str(path))
        with TemporaryFile(dir=path.resolve().parent):
            pass


def require_apart(path: Path, inputs: Iterable[str | Path]) -> None:
    """Check that a file to write is none of those that are read, which it would replace; links are followed.

    Raises:
        UserError: it is one.
    """
    with _unwritable_named(path):
        same = [given for given in inputs if path.exists() and Path(given).exists() and path.samefile(given)]
    if same:
        raise UserError(f"{path}: is read too, and writing would replace it; name another file to write")


@contextmanager
def _unwritable_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({why_unwritable(error)}); choose another place") from error


def why_unwritable(error: OSError) -> str:
    """Why a file cannot be written. The system's own words for a path below a file mislead ("File exists")."""
    is_below_file = isinstance(error, FileExistsError | NotADirectoryError)
    return "its parent is a file, not a folder" if is_below_file else error.strerror or str(error)
