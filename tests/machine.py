"""The same machine for every test, whatever machine and shell it was started from.

A test finds few programs, few variables, an empty home and signals that do what they do by default. What it needs
beyond that it brings along, so that it fails here rather than on a machine that lacks it.
"""

import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType

PROGRAMS = """
    awk basename bash cat chmod cp cut date dirname echo env expr false find git grep gzip head hostname id ln ls mkdir
    mktemp mv nohup nproc printenv printf pwd readlink realpath rm rmdir sed seq setsid sh sleep sort stat tail tar tee
    test timeout touch tr true uname uniq wc which xargs
"""
"""Of Debian's minimal base, and git: no launcher, no compiler, nothing of procps or iproute2."""

WHOLE_PATH = "NEOX_TESTS_PATH"
"""Variable with the PATH that pytest was started with, for the tests that need a compiler."""

_KEPT = (
    *("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "USER", "PY_COLORS"),
    *("PYTHONHASHSEED", "PYTHONHOME", "PYTHONPATH", "NEOX_CHAOS_SEED", "NEOX_CLUSTER_MISSING", WHOLE_PATH),
)
_KEPT_PREFIXES = (
    *("LD_", "OMP_", "PYTEST_", "COV_"),
    *("ATEN_", "DNNL_", "MKL_", "ONEDNN_"),  # the instructions that numbers are computed with
    *(("CUDA_", "NVIDIA_") if any(Path("/dev").glob("nvidia[0-9]*")) else ()),  # the devices that one may use
)
_ENDING = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCHLD),
)


def clean_environment() -> None:
    """Forget what the shell has exported, and its umask; the workers of pytest and all else inherit that."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    os.environ.clear()
    os.environ.update(kept, LANG="C.UTF-8")
    os.umask(0o022)
    if sys.warnoptions:  # PYTHONWARNINGS, which this process has read already
        sys.warnoptions.clear()
        warnings.resetwarnings()


def hide_programs(folder: Path) -> None:
    """Leave `PROGRAMS` alone on the PATH, as links in `folder`, and let the home be an empty folder beside them."""
    programs, home = folder / "bin", folder / "home"
    programs.mkdir()
    home.mkdir()
    for name in PROGRAMS.split():
        if found := shutil.which(name):
            (programs / name).symlink_to(Path(found).absolute())
    os.environ.update({WHOLE_PATH: os.environ.get("PATH", os.defpath), "PATH": str(programs), "HOME": str(home)})


def let_signals_through() -> None:
    """Give the processes that are started from now on the signals as they are by default.

    Under `nohup`, or as a job in the background of a script, they would be ignored. This process still does so: with a
    handler, which no other program inherits.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    for signum in _ENDING:
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, _ignore)


def _ignore(signum: int, frame: FrameType | None) -> None:
    pass
