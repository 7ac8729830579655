"""Standard output is for results: what libraries print there goes to standard error.

A script claims it once, before anything else prints (`claim`): its results get a stream of their own to where standard
output went, and descriptor 1 becomes standard error, for Python, for libraries in C and for child processes alike.
"""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from neox.errors import OutputError

EXIT_BROKEN_PIPE = 141
"""Status of a script whose reader has gone: 128 + SIGPIPE."""


class HelpParser(argparse.ArgumentParser):
    """A parser whose `--help` is a result."""

    def print_help(self, file: Any = None) -> None:
        """Print the help, to standard output unless a file is given."""
        super().print_help(file or stream())
        finish()


class _Claimed:
    """Where results go in this process; None where that is plain standard output."""

    stream: TextIO | None = None


def open_streams() -> None:
    """Give a process the standard streams that it was started without (`2>&-`), lest files of ours take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def claim() -> None:
    """Keep standard output for results from now on. A stand-in for it, such as a test's, is left as it is."""
    plain = sys.stdout
    if _Claimed.stream is not None or not isinstance(plain, io.TextIOWrapper) or _descriptor(plain) != 1:
        return
    plain.flush()
    # What the terminal's encoding has no bytes for, a name that is not UTF-8 say, is spelled out as on standard error.
    errors = "backslashreplace" if plain.errors == "strict" else plain.errors
    apart = open(os.dup(1), "w", encoding=plain.encoding, errors=errors)  # noqa: SIM115
    apart.reconfigure(line_buffering=plain.line_buffering or plain.write_through)  # a terminal, or `python -u`
    os.dup2(2, 1)
    plain.reconfigure(line_buffering=True)  # in order with standard error
    _Claimed.stream = apart


def stream() -> TextIO:
    """The stream of results."""
    return _Claimed.stream or sys.stdout


@contextmanager
def replaced(by: TextIO) -> Iterator[None]:
    """Have results go to another stream."""
    before, _Claimed.stream = _Claimed.stream, by
    try:
        yield
    finally:
        _Claimed.stream = before


def descriptor() -> int | None:
    """Standard output for a child process whose results are this process's; None: let it inherit."""
    return None if _Claimed.stream is None else _descriptor(_Claimed.stream)


def print_result(*values: object, sep: str = " ", end: str = "\n", flush: bool = False) -> None:
    """Print as `print` does, to standard output.

    Raises:
        OutputError: it cannot be written.
        BrokenPipeError: whoever read it has gone.
    """
    with _unwritten_named():
        print(*values, sep=sep, end=end, file=stream(), flush=flush)


def finish() -> None:
    """Write out what is buffered.

    Raises:
        OutputError: it cannot be written.
        BrokenPipeError: whoever read it has gone.
    """
    with _unwritten_named():
        stream().flush()


def hand_over() -> None:
    """Make standard output what it was, for a program that this process becomes."""
    finish()
    number = descriptor()
    if number is not None:
        os.dup2(number, 1)


def drop() -> None:
    """Let results go nowhere from now on: nobody reads them, and what is buffered would fail again at the exit."""
    number = _descriptor(stream())
    if number is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextmanager
def _unwritten_named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        drop()
        raise OutputError(
            f"standard output: cannot be written ({error.strerror}); results are lost; send it elsewhere"
        ) from error


def _descriptor(of: TextIO) -> int | None:
    try:
        return of.fileno()
    except (AttributeError, OSError, ValueError):  # a stand-in, or closed
        return None
