"""run_local with real processes: statuses, endings, signals, death of the parent, one report of an error."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import wait_until_gone

from neox.launch import endings
from neox.launch.environment import detect, export
from neox.launch.local import local_worker_count, single_placement

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = """
    import os, sys
    from neox.launch.local import run_local
    sys.exit(run_local(sys.argv[2:], workers=int(sys.argv[1]), environ=os.environ, grace=float(os.environ["GRACE"])))
"""


@pytest.fixture
def environ():
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK")}
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    # Seconds that a worker has to end in, longer than it can need.
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "GRACE": "100"}


@pytest.fixture
def launch(tmp_path, environ):
    """Start `workers` copies of a script's text under run_local; returns the launcher's process."""
    started = []

    def start(script, *, workers, arguments=(), **options):
        (tmp_path / "worker.py").write_text(textwrap.dedent(script))
        command = [sys.executable, "-c", textwrap.dedent(LAUNCH), str(workers), str(tmp_path / "worker.py")]
        process = subprocess.Popen(
            [*command, str(tmp_path), *arguments],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(paths):
    """Wait until every file exists and return the numbers written in them."""
    deadline = time.monotonic() + 240
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline, f"none of {paths}"
        time.sleep(0.02)
    return [int(path.read_text()) for path in paths]


def test_every_rank_is_told_its_place(launch, tmp_path):
    script = """
        import json, os, pathlib, sys
        from neox.launch.environment import detect
        place = vars(detect(os.environ)) | {"threads": os.environ["OMP_NUM_THREADS"], "args": sys.argv[2:]}
        pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps(place))
    """
    status, _, err = finish(launch(script, workers=3, arguments=["a.yml", "x=1"]))
    assert (status, err) == (0, "")
    places = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    assert [place["rank"] for place in places] == [place["local_rank"] for place in places] == [0, 1, 2]
    assert {place["world_size"] for place in places} == {place["local_world_size"] for place in places} == {3}
    assert len({place["master_port"] for place in places}) == 1
    assert {place["launcher"] for place in places} == {"local"}
    assert all(place["args"] == ["a.yml", "x=1"] for place in places)
    cores = len(os.sched_getaffinity(0))
    assert {place["threads"] for place in places} == {str(max(1, cores // 3))}


def test_users_thread_count_is_kept(launch, environ):
    environ["OMP_NUM_THREADS"] = "7"
    status, out, _ = finish(launch("import os; print(os.environ['OMP_NUM_THREADS'])", workers=1))
    assert (status, out) == (0, "7\n")


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([0, 0], 0), ([0, 3], 3), ([5, 0], 5), ([-signal.SIGSEGV, 0], 128 + signal.SIGSEGV)],
)
def test_exit_status(launch, statuses, expected):
    script = f"""
        import os, signal, sys
        status = {[int(status) for status in statuses]}[int(os.environ["RANK"])]
        sys.exit(status) if status >= 0 else os.kill(os.getpid(), -status)
    """
    assert finish(launch(script, workers=2))[0] == expected


def test_users_mistake_outranks_an_earlier_crash(launch):
    # Rank 1 breaks first; rank 0, asked to end, turns out to end with a user's mistake.
    script = """
        import os, pathlib, signal, sys, time
        ready = pathlib.Path(sys.argv[1], "ready")
        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))
            ready.touch()
            time.sleep(60)
        while not ready.exists():
            time.sleep(0.01)
        sys.exit(1)
    """
    assert finish(launch(script, workers=2))[0] == 2


def test_first_failure_ends_the_others(launch, tmp_path):
    script = """
        import os, pathlib, sys, time
        rank = os.environ["RANK"]
        pathlib.Path(sys.argv[1], rank).write_text(str(os.getpid()))
        if rank == "1":
            while not all(pathlib.Path(sys.argv[1], r).exists() for r in "02"):
                time.sleep(0.01)
            sys.exit(4)
        time.sleep(600)
    """
    process = launch(script, workers=3)
    pids = wait_for([tmp_path / rank for rank in "012"])
    assert finish(process)[0] == 4
    wait_until_gone(pids)


def test_a_worker_deaf_to_sigterm_is_killed_with_its_children(launch, tmp_path, environ):
    environ["GRACE"] = "1"
    script = """
        import os, pathlib, signal, subprocess, sys, time
        folder = pathlib.Path(sys.argv[1])
        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen(["sleep", "60"])
            (folder / "child").write_text(str(child.pid))
            (folder / "deaf").write_text(str(os.getpid()))
            time.sleep(60)
        while not (folder / "deaf").exists():
            time.sleep(0.01)
        sys.exit(6)
    """
    process = launch(script, workers=2)
    pids = wait_for([tmp_path / "child", tmp_path / "deaf"])
    assert finish(process)[0] == 6
    wait_until_gone(pids)


HEARING = """
    import os, pathlib, signal, sys, time
    def hear(signum, frame):
        pathlib.Path(sys.argv[1], "heard" + os.environ["RANK"]).write_text(str(signum))
        time.sleep(float(sys.argv[2]))
        sys.exit(0)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, hear)
    pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_and_workers_may_take_their_time(launch, tmp_path, environ, signum):
    environ["GRACE"] = "1"
    process = launch(HEARING, workers=2, arguments=["2"])  # longer than the grace time of 1 s
    wait_for([tmp_path / rank for rank in "01"])
    process.send_signal(signum)
    assert finish(process)[0] == 0
    assert wait_for([tmp_path / "heard0", tmp_path / "heard1"]) == [signum, signum]


def run_in_terminal(environ, folder, script, *, typed):
    """Run two workers in a pseudo-terminal, type once both have written their pid; the exit status."""
    (folder / "worker.py").write_text(textwrap.dedent(script))
    command = [sys.executable, "-c", textwrap.dedent(LAUNCH), "2", str(folder / "worker.py"), str(folder)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, environ)
    try:
        wait_for([folder / rank for rank in "01"])
        os.write(terminal, typed)
        deadline = time.monotonic() + 240
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline, "the launcher does not end"
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(ended[1])
    finally:
        os.close(terminal)  # hangs up whatever is left


def test_rank_0_reads_the_terminal(environ, tmp_path):
    script = """
        import os, pathlib, sys
        rank = os.environ["RANK"]
        pathlib.Path(sys.argv[1], rank).write_text(str(os.getpid()))
        pathlib.Path(sys.argv[1], "read" + rank).write_text(sys.stdin.readline() or "nothing")
    """
    assert run_in_terminal(environ, tmp_path, script, typed=b"hello\n") == 0
    assert [(tmp_path / f"read{rank}").read_text() for rank in "01"] == ["hello\n", "nothing"]


def test_ctrl_c_reaches_each_worker_once(environ, tmp_path):
    script = """
        import os, pathlib, signal, sys, time
        heard = []
        signal.signal(signal.SIGINT, lambda signum, frame: heard.append(signum))
        folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
        (folder / rank).write_text(str(os.getpid()))
        deadline = time.monotonic() + 20
        while not heard and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # time for a second one
        (folder / ("heard" + rank)).write_text(str(len(heard)))
    """
    assert run_in_terminal(environ, tmp_path, script, typed=b"\x03") == 0
    assert wait_for([tmp_path / "heard0", tmp_path / "heard1"]) == [1, 1]


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored_is_not_passed_on(launch, tmp_path, signum):
    """As `nohup` wants, and the shell of a script that has started it in the background."""
    process = launch(HEARING, workers=1, arguments=["0"], preexec_fn=lambda: signal.signal(signum, signal.SIG_IGN))
    wait_for([tmp_path / "0"])
    process.send_signal(signum)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0
    assert wait_for([tmp_path / "heard0"]) == [signal.SIGTERM]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 128 + signal.SIGKILL), (signal.SIGINT, 130)])
def test_second_signal_kills(launch, tmp_path, signum, status):
    process = launch(HEARING, workers=2, arguments=["60"])
    pids = wait_for([tmp_path / rank for rank in "01"])
    process.send_signal(signum)
    wait_for([tmp_path / "heard0", tmp_path / "heard1"])
    time.sleep(endings._SECONDS_OF_ECHOES)
    process.send_signal(signum)
    assert finish(process)[0] == status
    wait_until_gone(pids)


def test_signals_that_come_together_are_one_request(launch, tmp_path):
    process = launch(HEARING, workers=2, arguments=["1"])  # in which the second one finds it
    wait_for([tmp_path / rank for rank in "01"])
    process.send_signal(signal.SIGSTOP)  # so that it hears them together, whenever they are sent
    deadline = time.monotonic() + 240
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        process.send_signal(signum)
    assert finish(process)[0] == 0


def test_interrupted_workers_give_130(launch, tmp_path):
    script = """
        import os, pathlib, sys, time
        from neox.launch.main import script_main
        def body(arguments):
            pathlib.Path(arguments[0], os.environ["RANK"]).write_text(str(os.getpid()))
            time.sleep(60)
        sys.exit(script_main(body))
    """
    process = launch(script, workers=2)
    wait_for([tmp_path / rank for rank in "01"])
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert (status, err) == (130, "")


def test_workers_die_with_a_killed_launcher(launch, tmp_path):
    script = """
        import os, pathlib, signal, sys, time
        from neox.launch.main import script_main
        def body(arguments):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            pathlib.Path(arguments[0], os.environ["RANK"]).write_text(str(os.getpid()))
            time.sleep(60)
        sys.exit(script_main(body))
    """
    process = launch(script, workers=2)
    pids = wait_for([tmp_path / rank for rank in "01"])
    process.kill()
    wait_until_gone(pids)


def test_worker_that_starts_after_its_launcher_died_ends(environ):
    script = "import sys; from neox.launch.main import script_main; sys.exit(script_main(lambda _: print('ran')))"
    orphan = environ | {"NEOX_LAUNCHER_PID": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=orphan, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (137, "")


def test_programs_started_by_a_worker_live(launch):
    script = """
        import subprocess, sys
        from neox.launch.main import script_main
        child = "import sys; from neox.launch.main import script_main; sys.exit(script_main(lambda _: 0))"
        sys.exit(script_main(lambda _: subprocess.run([sys.executable, "-c", child]).returncode))
    """
    assert finish(launch(script, workers=1))[0] == 0


def test_users_mistake_is_printed_once(launch):
    script = """
        import sys
        from neox.errors import ConfigError
        from neox.launch.main import script_main
        def body(arguments):
            raise ConfigError("a.yml:3: num_layer: did you mean num_layers?")
        sys.exit(script_main(body))
    """
    status, _, err = finish(launch(script, workers=4))
    assert (status, err) == (2, "a.yml:3: num_layer: did you mean num_layers?\n")


def test_mistake_of_one_rank_alone_is_printed(launch):
    script = """
        import os, sys, time
        from neox.errors import DataError
        from neox.launch.main import script_main
        def body(arguments):
            if os.environ["RANK"] == "2":
                raise DataError("shard 2 is missing")
            time.sleep(60)
        sys.exit(script_main(body))
    """
    status, _, err = finish(launch(script, workers=3))
    assert (status, err) == (2, "shard 2 is missing\n")


def config(*, num_gpus=None, tensor=1, stages=1):
    launch = SimpleNamespace(num_gpus=num_gpus)
    return SimpleNamespace(launch=launch, parallel=SimpleNamespace(model_parallel_size=tensor, pipeline_stages=stages))


@pytest.mark.parametrize(
    ("settings", "devices", "expected"),
    [
        ({}, 8, 8),
        ({"num_gpus": 4}, 8, 4),
        ({"num_gpus": 16}, 8, 8),
        ({"num_gpus": -1}, 8, 8),
        ({}, 0, 1),
        ({"tensor": 2, "stages": 4}, 0, 8),
        ({"num_gpus": 2, "tensor": 1}, 0, 2),
    ],
)
def test_local_worker_count(settings, devices, expected):
    assert local_worker_count(config(**settings), devices) == expected


def test_single_placement_is_a_world_of_one():
    exported = {}
    export(single_placement(), exported)
    placement = detect(exported)
    assert (placement.rank, placement.world_size, placement.master_addr) == (0, 1, "127.0.0.1")
    with socket.socket() as probe:
        probe.bind((placement.master_addr, placement.master_port))  # the port is free
