"""Exit statuses and messages of a script run alone or under a foreign launcher."""

import subprocess
import sys
import time

import pytest

from neox.errors import ConfigError, UserError
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


def test_ranks_that_share_a_file_say_it_once(capsys, tmp_path):
    for rank in ("0", "1"):
        report_user_error(UserError("no data"), environ={"RANK": rank, "NEOX_ERROR_LOCK": str(tmp_path / "lock")})
    assert capsys.readouterr().err == "no data\n"


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
