"""Running the project's own scripts as a user would, and showing how."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from neox import results
from neox.errors import LaunchError
from neox.results import print_result

ROOT = Path(__file__).resolve().parents[2]
"""The repository, where the scripts and configurations are."""

MOST_THREADS = 16  # more do not help a model of this size


def typed(path: Path) -> str:
    """Return a path of the repository as the user would type it here."""
    here = os.path.relpath(path)
    return str(path) if here.startswith(os.pardir) else here


def run_script(path: str, *arguments: str) -> None:
    """Print a command, run it with this interpreter and wait.

    Args:
        path: of the script, from the repository on.
        arguments: what it is given.

    Raises:
        LaunchError: it failed; what went wrong it has said itself.
    """
    print_result(f"$ python {shlex.join([typed(ROOT / path), *arguments])}", flush=True)
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    environ = {"OMP_NUM_THREADS": str(threads), **os.environ}
    status = subprocess.run(
        [sys.executable, str(ROOT / path), *arguments], env=environ, stdout=results.descriptor(), check=False
    ).returncode
    if status:
        raise LaunchError(f"{path} ended with status {status}; fix what it reports above, then start again")


def show(purpose: str, command: str) -> None:
    """Print what a command of the repository is for and, below it, the command."""
    path, _, arguments = command.partition(" ")
    print_result(f"  {purpose}\n    python {typed(ROOT / path)} {arguments}")
