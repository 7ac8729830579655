"""Exit statuses and messages of a script run alone or under a foreign launcher."""

import errno
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neox.errors import ConfigError, UserError
from neox.launch import meeting
from neox.launch.local import single_placement
from neox.launch.main import script_main
from neox.launch.reporting import report_user_error


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NEOX_ERROR_LOCK", "NEOX_LAUNCHER_PID"):
        monkeypatch.delenv(name, raising=False)


def raising(error):
    def body(arguments):
        raise error

    return body


def test_statuses(capsys):
    assert script_main(lambda arguments: None, []) == 0
    assert script_main(lambda arguments: 7, []) == 7
    assert script_main(raising(KeyboardInterrupt()), []) == 130
    assert script_main(raising(ConfigError("x.yml:1: bad")), []) == 2
    assert capsys.readouterr().err == "x.yml:1: bad\n"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        script_main(lambda arguments: 1 // 0, [])


def test_a_path_that_cannot_be_used_is_a_mistake_until_the_process_is_a_rank(capsys, monkeypatch, tmp_path):
    path = tmp_path / ("x" * 300)
    monkeypatch.setattr(meeting._Self, "is_rank", False)
    assert script_main(lambda arguments: path.is_dir(), []) == 2
    assert capsys.readouterr().err == (
        f"{path}: cannot be used ({os.strerror(errno.ENAMETOOLONG)}); check the path and its rights\n"
    )
    with pytest.raises(FileNotFoundError):  # a defect, perhaps
        script_main(lambda arguments: (tmp_path / "absent").stat(), [])
    meeting.enter(single_placement(), {})
    with pytest.raises(OSError, match="x" * 300):
        script_main(lambda arguments: path.is_dir(), [])


def test_arguments_without_local_rank(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["train.py", "--local_rank=1", "a.yml"])
    assert script_main(seen.extend) == 0
    assert seen == ["a.yml"]


@pytest.mark.parametrize(
    ("rank", "local_rank", "seconds", "said"),
    [(0, 0, 0.0, "no data"), (8, 0, 0.1, "[rank 8] no data"), (9, 1, 0.2, "[rank 9] no data")],
    ids=["first of all", "first of a host", "another"],
)
def test_ranks_leave_time_to_be_ended(capsys, monkeypatch, rank, local_rank, seconds, said):
    monkeypatch.setattr("neox.launch.reporting._LAUNCHER_REACTION_SECONDS", 0.1)
    meeting = {"WORLD_SIZE": "16", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    begun = time.monotonic()
    report_user_error(UserError("no data"), environ=meeting | {"RANK": str(rank), "LOCAL_RANK": str(local_rank)})
    assert capsys.readouterr().err == f"{said}\n"
    assert time.monotonic() - begun >= seconds


SHARED = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


def test_ranks_that_share_a_file_say_it_once(capsys, tmp_path):
    shared = SHARED | {"NEOX_ERROR_LOCK": str(tmp_path / "lock")}
    for rank in ("1", "0"):
        report_user_error(UserError("no data"), environ=shared | {"RANK": rank})
    assert capsys.readouterr().err == "no data\n"


def test_another_host_leaves_time_to_be_ended_and_its_mistake_is_known_before(capsys, monkeypatch, tmp_path):
    lock = tmp_path / "lock"
    marks = []
    monkeypatch.setattr("neox.launch.reporting.time.sleep", lambda seconds: marks.append((seconds, lock.read_text())))
    found = SHARED | {"RANK": "1", "NEOX_LOCAL_LAUNCH": "1", "NEOX_ERROR_LOCK": str(lock)}
    for _ in range(2):  # two ranks of that host
        report_user_error(UserError("no data"), environ=found)
    assert marks == [(3.0, "2")]
    assert capsys.readouterr().err == "[rank 1] no data\n"


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"OMPI_COMM_WORLD_RANK": "3"}, "[rank 3] "),
        ({"OMPI_COMM_WORLD_RANK": "0"}, ""),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, "[rank 2] "),
        ({"NEOX_NODE_RANK": "1", "NEOX_SLOTS": "1,1", "MASTER_ADDR": "n1"}, f"[{socket.gethostname()}] "),
        ({"NEOX_NODE_RANK": "0", "NEOX_SLOTS": "1,1", "MASTER_ADDR": "n1"}, ""),
    ],
)
def test_who_is_not_the_first_waits_and_says_who_it_is(capsys, monkeypatch, environ, name):
    """Also where the mistake is that the launcher did not tell enough, and before a host's ranks are there."""
    waited = []
    monkeypatch.setattr("neox.launch.reporting.time.sleep", waited.append)
    report_user_error(UserError("no address"), environ=environ)
    assert capsys.readouterr().err == f"{name}no address\n"
    assert waited == ([1.0] if name else [])


def test_launch_imports_no_torch():
    modules = "neox.launch.arguments, neox.launch.environment, neox.launch.local, neox.launch.main"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_reader_that_leaves_is_no_defect() -> None:
    script = "import sys; from neox.launch.main import script_main\n"
    script += "sys.exit(script_main(lambda argv: [print(i) for i in range(10**6)] and 0, []))"
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 141


LEAVING = """
import atexit, os, sys, threading, time
from neox.launch.main import leave

class Aborts:
    def __del__(self):
        os.abort()

def late():
    time.sleep(0.2)
    print("thread ended")

global_object = Aborts()  # dies in the teardown of the interpreter, as tensors held by threads of gloo do
atexit.register(print, "atexit ran")
threading.Thread(target=late).start()
sys.stdout.write("begun\\n")
leave(STATUS)
"""


@pytest.mark.parametrize("status", [0, 2])
def test_leaving_finishes_the_programs_own_work_and_skips_the_teardown(status: int) -> None:
    script = LEAVING.replace("STATUS", str(status))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.split("\n") == ["begun", "thread ended", "atexit ran", ""]
    assert done.stderr == ""


def test_statuses_of_child_processes_where_they_are_not_asked_for() -> None:
    """Some services start their programs with SIGCHLD ignored, and the kernel then keeps no status."""
    script = "import subprocess, sys; from neox.launch.main import script_main\n"
    script += "sys.exit(script_main(lambda _: subprocess.run(['sh', '-c', 'exit 3']).returncode, []))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN), check=False)
    assert done.returncode == 3


def test_a_process_without_standard_streams(tmp_path: Path) -> None:
    """As a service may start it: what it prints goes nowhere, and above all not into its files."""
    script = "import sys; from neox.launch.main import leave, script_main\n"
    script += "def main(arguments): file = open(arguments[0], 'w'); print('said'); print('said', file=sys.stderr)\n"
    script += "leave(script_main(main))"
    command = shlex.join([sys.executable, "-c", script, str(tmp_path / "file")])
    done = subprocess.run(["sh", "-c", f"exec {command} <&- >&- 2>&-"], check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == ""
