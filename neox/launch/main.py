"""The frame around every script: one line for a user's mistake, and the exit status."""

import os
import sys
from collections.abc import Callable, Sequence

from neox.errors import UserError
from neox.launch.environment import strip_local_rank
from neox.launch.reporting import report_user_error
from neox.launch.worker import die_with_parent

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def script_main(function: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run `function(arguments)` and return the exit status, for `sys.exit(script_main(main))`.

    Args:
        function: the script's body; returns its exit status, None meaning 0.
        argv: arguments without the script's name; default: the process's own.

    Returns:
        2 after a UserError, whose text goes to stderr once per group of workers; 130 after Ctrl-C. Any other
        exception is a defect and keeps its traceback.
    """
    die_with_parent(os.environ)
    arguments = strip_local_rank(sys.argv[1:] if argv is None else argv)
    try:
        return function(arguments) or 0
    except UserError as error:
        report_user_error(error)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` say, has seen enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
