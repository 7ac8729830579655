"""Everything that a worker prints, where it belongs."""

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from neox import results
from neox.errors import ConfigError, UserError
from neox.launch.environment import LOCAL_LAUNCH
from neox.launch.reporting import ERROR_LOCK
from neox.launch.restarts import times_restarted
from neox.patience import is_mistake
from neox.training.logs.files import AppendedFile, Copy, HostFile, RankFile
from neox.training.logs.once import Once
from neox.training.logs.streams import CopiedStream, OneOfMany

if TYPE_CHECKING:
    from neox.config import Config

RANKS = "ranks"


def log_folder(config: "Config") -> Path | None:
    """`log_dir`, else `logs` in `save`; None where neither is set."""
    if config.logging.log_dir is not None:
        return Path(config.logging.log_dir)
    return Path(config.checkpoint.save) / "logs" if config.checkpoint.save is not None else None


@contextlib.contextmanager
def logged_output(config: "Config", environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Copy standard output and error to files, and show on the terminal one readable stream.

    `<log folder>/ranks/rank-<rank>.log` has what the rank prints, and `<host>_stdout.txt` and `<host>_stderr.txt` in
    `log_dir`, if that is set, have what all workers of the host print. The terminal shows what rank 0 prints, and of
    the others' standard error what no rank of their host has said before. What is printed outside of Python is not
    copied; the stacks of a process that dies of a fatal signal go to `<log folder>/ranks/rank-<rank>.fatal.txt`.

    Raises:
        ConfigError: the files cannot be written.
    """
    folder = log_folder(config)
    settings = config.logging
    if folder is None or not (settings.log_dir or settings.log_file_size):
        yield
        return
    rank, world = int(environ.get("RANK", "0")), int(environ.get("WORLD_SIZE", "1"))
    once = Once(_own_folder(environ)) if world > 1 else None
    with ExitStack() as stack:
        try:
            own = _own_copies(stack, config, folder, rank)
            output = [*own, *_host_copies(stack, config, "stdout")]
            errors = [*own, *_host_copies(stack, config, "stderr")]
            stack.enter_context(_fatal_stacks(folder / RANKS / f"rank-{rank:05d}.fatal.txt"))
        except OSError as error:
            raise ConfigError(f"cannot write {error.filename}: {error.strerror}; change log_dir or save") from error
        if own:
            own[0].write(f"started: rank {rank} of {world} on {socket.gethostname()}, process {os.getpid()}\n")
        if once is not None:
            stack.callback(once.forget)  # the last rank to leave leaves nothing
        with _replaced_streams(rank, output, errors, once):
            yield


def _own_folder(environ: Mapping[str, str]) -> Path:
    """A folder that the ranks of this start on this host share: the launcher's own, which it removes, if it has one.

    No two starts have one in common: what a run that was killed has said, the next one on its port has still to say.
    """
    if environ.get(LOCAL_LAUNCH) and environ.get(ERROR_LOCK):
        return Path(environ[ERROR_LOCK]).with_name("said")
    start = (os.getuid(), environ.get("MASTER_PORT", "0"), os.getppid(), times_restarted(environ))
    return Path(tempfile.gettempdir()) / "-".join(["neox-said", *map(str, start)])


def _own_copies(stack: ExitStack, config: "Config", folder: Path, rank: int) -> list[Copy]:
    """The rank's file, which has standard output and error in one."""
    settings = config.logging
    if not settings.log_file_size:
        return []
    path = folder / RANKS / f"rank-{rank:05d}.log"
    tell = sys.stderr.write
    file = AppendedFile(path, tell, most_bytes=settings.log_file_size, earlier=settings.log_file_count)
    copy = RankFile(file, rank)
    stack.callback(copy.close)
    return [copy]


def _host_copies(stack: ExitStack, config: "Config", name: str) -> list[Copy]:
    if config.logging.log_dir is None:
        return []
    path = Path(config.logging.log_dir) / f"{socket.gethostname()}_{name}.txt"
    copy = HostFile(AppendedFile(path, sys.stderr.write))
    stack.callback(copy.close)
    return [copy]


@contextlib.contextmanager
def _replaced_streams(rank: int, output: list[Copy], errors: list[Copy], once: Once | None) -> Iterator[None]:
    """Have results, `print`, warnings and log messages go to the terminal and to the files."""
    before = sys.stdout, sys.stderr
    show_output = None if rank == 0 else _show_nothing
    show_errors = OneOfMany(sys.stderr, rank, once) if once is not None else None
    after = CopiedStream(before[0], output, show_output), CopiedStream(before[1], errors, show_errors)
    figures = CopiedStream(results.stream(), output, show_output)
    sys.stdout, sys.stderr = after  # type: ignore[assignment]
    moved = [(handler, place) for handler in _handlers() for place in (0, 1) if handler.stream is before[place]]
    for handler, place in moved:
        handler.setStream(after[place])  # type: ignore[arg-type]
    try:
        with results.replaced(figures):  # type: ignore[arg-type]
            yield
    except BaseException as error:
        if isinstance(error, UserError):
            print(error, file=after[1].copy)
        elif not isinstance(error, SystemExit):
            traceback.print_exc(file=after[1].copy)
        raise
    finally:
        sys.stdout, sys.stderr = before
        for handler, place in moved:
            handler.setStream(before[place])


def _show_nothing(text: str) -> None:
    """The terminal has standard output of the first rank alone."""


def _handlers() -> Iterator["logging.StreamHandler[TextIO]"]:
    """Those of libraries that took hold of a stream when they were imported, as DeepSpeed's does."""
    loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            yield handler


@contextlib.contextmanager
def _fatal_stacks(path: Path) -> Iterator[None]:
    """Have the stacks of all threads written to a file where a signal such as SIGSEGV or SIGBUS ends the process."""
    was_enabled = faulthandler.is_enabled()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        if is_mistake(error):
            raise
        yield  # without them: they go to standard error
        return
    faulthandler.enable(file)
    try:
        yield
    finally:
        faulthandler.disable()
        if was_enabled:
            faulthandler.enable(sys.__stderr__ or 2)
        with file:
            is_empty = file.tell() == 0
        if is_empty:
            path.unlink(missing_ok=True)
