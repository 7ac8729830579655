"""Copies of what a worker prints, in files beside the terminal."""

import contextlib
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from neox.errors import ConfigError


class Tee:
    """A text stream that also writes to a file.

    Attributes:
        terminal: the stream it stands in for.
        copy: the file.
    """

    def __init__(self, terminal: TextIO, copy: TextIO) -> None:
        self.terminal, self.copy = terminal, copy

    def write(self, text: str) -> int:
        """Write to both."""
        self.copy.write(text)
        return self.terminal.write(text)

    def flush(self) -> None:
        """Flush both."""
        self.copy.flush()
        self.terminal.flush()

    def __getattr__(self, name: str) -> Any:
        # Whether it is a terminal, its encoding, its number: as without the copy.
        return getattr(self.terminal, name)


@contextlib.contextmanager
def copied_output(log_dir: str | None) -> Iterator[None]:
    """Copy standard output and error to `<host>_stdout.txt` and `<host>_stderr.txt` in `log_dir`, if there is one.

    All workers of a host append to the same two files, line by line. What is printed outside of Python is not copied.

    Raises:
        ConfigError: if the files cannot be written.
    """
    if log_dir is None:
        yield
        return
    output, error = sys.stdout, sys.stderr
    with _open(Path(log_dir), "stdout") as output_copy, _open(Path(log_dir), "stderr") as error_copy:
        sys.stdout, sys.stderr = Tee(output, output_copy), Tee(error, error_copy)  # type: ignore[assignment]
        try:
            yield
        except BaseException:
            traceback.print_exc(file=error_copy)
            raise
        finally:
            sys.stdout, sys.stderr = output, error


def beside_copy(stream: TextIO) -> TextIO:
    """The stream itself, without the copy: for a progress bar, which would fill a file with its redrawing."""
    return stream.terminal if isinstance(stream, Tee) else stream


def _open(folder: Path, name: str) -> TextIO:
    path = folder / f"{socket.gethostname()}_{name}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; change log_dir") from error
