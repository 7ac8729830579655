"""Programs on several hosts, over a stand-in for ssh that runs them here."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from neox.launch import conversation, ssh
from neox.launch.conversation import Errand, converse
from neox.launch.ssh import remote_command, run_everywhere

ROOT = Path(__file__).resolve().parents[2]
FAKE = '#!/bin/sh\n[ "$1" != gone ] || { echo "no route" >&2; exit 255; }\nshift\nexec sh -c "$*"\n'


@pytest.fixture(autouse=True)
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "ssh"
    path.write_text(FAKE)
    path.chmod(0o755)
    monkeypatch.setattr(ssh, "SSH", (str(path),))
    monkeypatch.setattr(conversation, "SSH", (str(path),))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return path


def program(code: str, *arguments: str, **variables: str) -> list[str]:
    return remote_command(["-c", textwrap.dedent(code), *arguments], variables)


def test_folder_variables_and_arguments_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = """
        import os, pathlib, sys
        pathlib.Path(sys.argv[1]).write_text(os.getcwd() + os.environ["WORDS"] + sys.argv[2])
    """
    words = 'it\'s $HOME & "more"'
    assert run_everywhere({"n1": program(code, "found", words, WORDS=words)}) == 0
    assert (tmp_path / "found").read_text() == f"{tmp_path}{words}{words}"


def test_the_first_to_fail_ends_the_others(tmp_path: Path) -> None:
    wait = """
        import pathlib, signal, sys, time
        def end(*_):
            pathlib.Path(sys.argv[1]).write_text("asked")
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        pathlib.Path(sys.argv[1]).write_text("up")
        time.sleep(60)
    """
    fail = """
        import os, pathlib, sys, time
        while not os.path.exists(sys.argv[1]) or not pathlib.Path(sys.argv[1]).read_text():
            time.sleep(0.02)
        sys.exit(7)
    """
    mark = str(tmp_path / "mark")
    assert run_everywhere({"n1": program(wait, mark), "n2": program(fail, mark)}) == 7
    assert Path(mark).read_text() == "asked"


@pytest.mark.parametrize(
    ("code", "status"), [("import sys; sys.exit(2)", 2), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_statuses(code: str, status: int) -> None:
    assert run_everywhere({"n1": program("pass"), "n2": program(code)}) == status


def test_a_host_that_cannot_be_reached() -> None:
    assert run_everywhere({"gone": program("pass")}) == 255


CALLER = """
import sys
from neox.launch import ssh
ssh.SSH = (sys.argv[1],)
code = '''
import pathlib, signal, sys, time
mark = pathlib.Path(sys.argv[1])
def note(number, frame):
    mark.write_text(signal.Signals(number).name)
    if number != signal.SIGUSR1:
        sys.exit(0)
for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
mark.write_text("up")
time.sleep(60)
'''
sys.exit(ssh.run_everywhere({"n1": ssh.remote_command(["-c", code, sys.argv[2]], {})}))
"""


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 240
    while not path.is_file() or path.read_text() != text:
        assert time.monotonic() < deadline, f"{path} never said {text}"
        time.sleep(0.02)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_signals_and_the_death_of_the_caller_reach_the_other_host(
    tmp_path: Path, fake_ssh: Path, ending: signal.Signals
) -> None:
    mark = tmp_path / "mark"
    caller = subprocess.Popen([sys.executable, "-c", CALLER, str(fake_ssh), str(mark)], stdin=subprocess.DEVNULL)
    wait_for(mark, "up")
    caller.send_signal(signal.SIGUSR1)
    wait_for(mark, "SIGUSR1")
    caller.send_signal(ending)
    # Nobody could tell the program of SIGKILL but the end of the line.
    wait_for(mark, "SIGINT" if ending == signal.SIGINT else "SIGTERM")
    assert caller.wait(240) == (0 if ending == signal.SIGINT else -signal.SIGKILL)


def test_a_program_that_ignores_its_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
        import os, signal, sys, time
        from neox.launch import remote
        remote.GRACE_SECONDS = 0.2
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        sys.exit(remote.run(["-c", stubborn]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.DEVNULL, timeout=240, check=False
    )
    # The line ends at once, perhaps before the program ignores SIGTERM.
    assert done.returncode in (128 + signal.SIGKILL, 128 + signal.SIGTERM)


def test_conversation() -> None:
    says = Errand(["-c", "import os, sys; print(os.environ['WHO']); print('aside', file=sys.stderr)"], {"WHO": "me"})
    fails = Errand(["-c", "import sys; print('first\\nlast', file=sys.stderr); sys.exit(3)"], {})
    sleeps = Errand(["-c", "import time; time.sleep(600)"], {})
    replies = converse({"n1": says, "gone": says, "n2": fails}, road="ssh", timeout=240)
    assert (replies["n1"].status, replies["n1"].lines) == (0, ["me"])
    assert (replies["gone"].status, replies["gone"].reason) == (255, "no route")
    assert (replies["n2"].status, replies["n2"].reason) == (3, "last")
    late = converse({"n1": sleeps}, road="ssh", timeout=1)["n1"]
    assert (late.status, late.reason) == (None, "no answer in time")


def test_srun_reaches_the_hosts_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/sh\nfor word; do case $word in --*) shift;; *) break;; esac; done\nexec "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    errand = Errand(["-c", "import os; print(os.environ['WHO'])"], {"WHO": "me"})
    replies = converse({"n1": errand}, road="srun", timeout=240)
    assert replies["n1"].lines == ["me"]
