"""The frame around every script: results alone on standard output, one line for a user's mistake, the exit status."""

import atexit
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NoReturn

from neox import results
from neox.errors import UserError
from neox.launch.endings import EXIT_INTERRUPTED
from neox.launch.environment import strip_local_rank
from neox.launch.meeting import is_rank
from neox.launch.reporting import report_user_error
from neox.launch.worker import die_with_parent
from neox.patience import path_mistake
from neox.results import EXIT_BROKEN_PIPE

EXIT_USER_ERROR = 2


def script_main(function: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run `function(arguments)` and return the exit status, for `sys.exit(script_main(main))`.

    Args:
        function: the script's body; returns its exit status, None meaning 0.
        argv: arguments without the script's name; default: the process's own. Then standard output is claimed for
            results too; a caller who passes arguments has uses of its own for it.

    Returns:
        2 after a UserError, 1 after one of storage that failed; its text goes to stderr once per group of workers. 2
        too after a path that cannot be used, before this process is a rank. 130 after Ctrl-C. Any other exception is a
        defect and keeps its traceback.
    """
    results.open_streams()
    _keep_statuses()
    if argv is None:
        results.claim()
    die_with_parent(os.environ)
    arguments = strip_local_rank(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return function(arguments) or 0
        finally:
            results.finish()
    except UserError as error:
        report_user_error(error)
        return error.exit_status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        results.drop()  # the reader, `head` say, has seen enough
        return EXIT_BROKEN_PIPE
    except OSError as error:
        mistake = None if is_rank() else path_mistake(error)
        if mistake is None:
            raise
        report_user_error(mistake)
        return mistake.exit_status


def _keep_statuses() -> None:
    """Have the kernel keep how child processes end; where SIGCHLD is ignored, a rank that fails seems to succeed."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def leave(status: int) -> NoReturn:
    """End a process that may have joined a process group: `leave(script_main(main))`.

    Does what the end of the interpreter does for a program's own objects (waits for its threads, runs `atexit`
    functions, flushes the standard streams, those of C too), and then ends without tearing the interpreter down. The
    threads of gloo may still let go of tensors at that time, which needs the interpreter, and on a busy machine the
    process then died of SIGABRT after all its work was done ("terminate called without an active exception").
    """
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    for stream in (results.stream(), sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            status = status or EXIT_BROKEN_PIPE
    ctypes.CDLL(None).fflush(None)
    os._exit(status)
