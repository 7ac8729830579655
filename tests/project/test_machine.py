"""What every test finds, whatever machine and shell it was started from."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import machine
import pytest

HIDDEN = """
    pdsh ssh sshd srun sbatch scontrol sinfo mpirun mpiexec orterun mpirun.openmpi mpiexec.hydra torchrun deepspeed
    cc gcc g++ c++ clang clang++ nvcc ninja make cmake ld ps pgrep pkill kill lsof ip ifconfig nvidia-smi curl wget less
    shellcheck python python3
"""
CHILD = """
import os, signal
ignored = [signum for signum in signal.valid_signals() if signal.getsignal(signum) is signal.SIG_IGN]
umask = os.umask(0)
print(sorted(map(int, ignored)), sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))), oct(umask))
"""
SHELL = """
    RANK=3 WORLD_SIZE=4 LOCAL_RANK=3 MASTER_ADDR=n1 MASTER_PORT=1 SLURM_JOB_ID=7 SLURM_PROCID=1 OMPI_COMM_WORLD_SIZE=2
    PMI_RANK=1 DLTS_HOSTFILE=/nowhere NEOX_SLOTS=1 NEOX_RESTARTS=3 WANDB_MODE=online HF_HOME=/nowhere CI=true
    DS_ACCELERATOR=cuda LC_ALL=POSIX PYTHONWARNINGS=error GIT_DIR=/nowhere http_proxy=http://127.0.0.1:1
"""
VARIABLES = dict(setting.split("=") for setting in SHELL.split())


def test_only_programs_of_a_minimal_machine_are_found() -> None:
    assert [name for name in HIDDEN.split() if shutil.which(name)] == []
    assert all(shutil.which(name) for name in ("sh", "bash", "git", "sleep"))


def test_nothing_of_the_callers_shell_is_left() -> None:
    assert {name for name in VARIABLES if name in os.environ} == set()
    assert os.environ["LANG"] == "C.UTF-8"
    assert sys.warnoptions == []
    assert Path.home() == Path(os.environ["PATH"]).with_name("home")


def test_a_process_has_default_signals_and_mask_and_umask() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    # Those that Python itself ignores.
    assert done.stdout == f"{sorted(map(int, (signal.SIGPIPE, signal.SIGXFSZ)))} [] 0o22\n"


def test_started_from_another_shell() -> None:
    """The tests above, as a job in the background of a script would run them, with the variables of a launcher."""

    def ignore() -> None:
        os.umask(0o077)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
        for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_IGN)

    names = [test_nothing_of_the_callers_shell_is_left, test_a_process_has_default_signals_and_mask_and_umask]
    tests = [f"{__file__}::{test.__name__}" for test in names]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environ |= VARIABLES | {"PATH": os.environ[machine.WHOLE_PATH]}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environ, preexec_fn=ignore, capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_a_compiler_is_found_where_it_is_asked_for(request: pytest.FixtureRequest) -> None:
    hidden = os.environ["PATH"]
    request.getfixturevalue("compilers")
    assert os.environ["PATH"] == os.environ[machine.WHOLE_PATH] != hidden
