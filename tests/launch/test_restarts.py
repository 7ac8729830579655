"""Ranks are started again after a loss, as often as allowed, and nothing of the attempt before is left."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import is_running
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import Config, config_from_dict
from neox.errors import ConfigError, LaunchError
from neox.launch import conversation, over_ssh, restarts, ssh, sweep
from neox.launch.environment import detect
from neox.launch.over_ssh import RunOverSsh
from neox.launch.restarts import Restarts, run_with_restarts, times_restarted
from neox.launch.start import Start

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses take no time, and are noted."""
    noted: list[float] = []

    def note(seconds: float, heard: list[int]) -> bool:
        noted.append(seconds)
        return not heard

    monkeypatch.setattr(restarts, "pause", note)
    monkeypatch.setattr(over_ssh, "pause", note)
    return noted


def attempts(*statuses: int | None, each: Callable[[int], None] = lambda number: None) -> tuple[list[int], object]:
    """An attempt that ends with each status in turn, and the numbers that it is called with."""
    numbers: list[int] = []

    def attempt(number: int, heard: list[int]) -> int | None:
        numbers.append(number)
        each(number)
        return statuses[len(numbers) - 1]

    return numbers, attempt


@pytest.mark.parametrize(
    ("statuses", "limit", "last"),
    [
        ([0], 3, 0),
        ([2], 3, 2),
        ([130], 3, 130),
        ([75], 3, 75),
        ([3], 0, 3),
        ([137, 0], 3, 0),
        ([1, 3, 2], 3, 2),
        ([3, 137, 1, 3], 3, 3),
        ([3, None], 3, 3),
    ],
    ids=str,
)
def test_what_is_tried_again(statuses: list[int | None], limit: int, last: int) -> None:
    numbers, attempt = attempts(*statuses)
    assert run_with_restarts(attempt, Restarts(limit, requeue_status=75)) == last  # type: ignore[arg-type]
    assert numbers == list(range(len(statuses)))


def test_what_is_said_and_how_long_it_waits(pauses: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    _, attempt = attempts(*[3] * 9, 0)
    assert run_with_restarts(attempt, Restarts(10)) == 0  # type: ignore[arg-type]
    assert capsys.readouterr().err.splitlines() == [f"status 3; restart {number} of 10" for number in range(1, 10)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_new_checkpoint_forgives_what_was_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def save(number: int) -> None:
        if number < 3:
            (tmp_path / "latest").write_text(f"global_step{number}")

    _, attempt = attempts(*[3] * 6, each=save)
    assert run_with_restarts(attempt, Restarts(2, tmp_path)) == 3  # type: ignore[arg-type]
    assert [line.split()[3] for line in capsys.readouterr().err.splitlines()] == ["1", "1", "1", "2"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_no_attempt_follows_a_request_to_end(signum: int) -> None:
    numbers, attempt = attempts(3, 0, each=lambda number: os.kill(os.getpid(), signum))
    assert run_with_restarts(attempt, Restarts(3)) == 3  # type: ignore[arg-type]
    assert numbers == [0]


@pytest.mark.parametrize(
    ("signum", "ended", "status"),
    [
        (signal.SIGTERM, 143, 75),
        (signal.SIGUSR1, 138, 75),
        (signal.SIGTERM, 3, 3),
        (signal.SIGTERM, 137, 137),
        (signal.SIGINT, 130, 130),
    ],
)
def test_ranks_that_die_of_a_request_to_end_were_asked_too_early(signum: int, ended: int, status: int) -> None:
    _, attempt = attempts(ended, each=lambda number: os.kill(os.getpid(), signum))
    assert run_with_restarts(attempt, Restarts(3, requeue_status=75)) == status  # type: ignore[arg-type]


def test_counts_of_those_who_start_a_run_again() -> None:
    assert times_restarted({}) == 0
    assert times_restarted({"SLURM_RESTART_COUNT": "2", "NEOX_RESTARTS": "1"}) == 2
    assert times_restarted({"TORCHELASTIC_RESTART_COUNT": "1"}) == 1


def test_another_port_for_each_restart_in_a_slurm_job() -> None:
    job = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
    ports = []
    for restart in range(3):
        place = detect(job | {"SLURM_JOB_NODELIST": "n1", "NEOX_RESTARTS": str(restart)})
        assert place is not None
        ports.append(place.master_port)
    assert len(set(ports)) == 3


def configured(**keys: object) -> Config:
    return config_from_dict(MODEL | TRAINING | ADAMW | keys, world_size=None)


def test_one_process_that_may_be_restarted_has_a_parent(tmp_path: Path) -> None:
    config = configured(max_restarts=1, save=str(tmp_path), checkpoint_factor=1)
    assert Start(config, workers=1).is_alone
    assert not Start(config, workers=1, restarts=Restarts.of(config)).is_alone


def test_deepspeeds_launcher_cannot_restart(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("one slots=1\n")
    keys = {"hostfile": str(tmp_path / "hosts"), "max_restarts": 1, "save": str(tmp_path), "checkpoint_factor": 1}
    config = configured(**keys)
    with pytest.raises(LaunchError, match="max_restarts: launcher pdsh cannot start ranks again; set launcher: ssh"):
        Start(config, workers=1, restarts=Restarts.of(config))


LAUNCH = """
    import os, sys
    from neox.launch.start import Start
    from neox.launch.restarts import Restarts
    from types import SimpleNamespace as Some
    start = Start.__new__(Start)
    start._pool = start._node = None
    start._workers, start._restarts = 2, Restarts(5)
    sys.exit(start.run(sys.argv[1:]))
"""
WORKER = """
    import os, pathlib, signal, subprocess, sys, time
    from neox.errors import DataError
    from neox.launch.main import script_main
    def mistake(arguments):
        raise DataError("no such file")
    folder, rank, restart = pathlib.Path(sys.argv[1]), os.environ["RANK"], os.environ["NEOX_RESTARTS"]
    loader = subprocess.Popen(["sleep", "60"])
    note = folder / f"{restart}-{rank}"
    whole = folder / f"unseen-{rank}"
    whole.write_text(f"{os.getpid()} {loader.pid} {os.environ['MASTER_PORT']}")
    whole.rename(note)
    while len(list(folder.glob(f"{restart}-*"))) < 2:
        time.sleep(0.01)
    if restart == "2":
        loader.kill()
        if len(sys.argv) == 2:
            sys.exit(0)
        if rank == "0":
            script_main(mistake)
            os.kill(int((folder / "2-1").read_text().split()[0]), signal.SIGKILL)
        time.sleep(60)
    if rank == "1":
        os.kill(os.getpid(), 9)
    time.sleep(60)
"""


@pytest.mark.parametrize("ends_by_a_mistake", [False, True])
def test_ranks_of_this_machine(tmp_path: Path, ends_by_a_mistake: bool) -> None:
    """Twice a rank is killed; then all end, or one has a mistake, and another dies of it first. Loaders die too."""
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    command = [sys.executable, "-c", textwrap.dedent(LAUNCH), str(tmp_path / "worker.py"), str(tmp_path)]
    done = subprocess.run(
        [*command, *(["mistake"] if ends_by_a_mistake else [])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == (2 if ends_by_a_mistake else 0), done.stderr
    told = ["no such file"] if ends_by_a_mistake else []
    assert done.stderr.splitlines() == ["status 137; restart 1 of 5", "status 137; restart 2 of 5", *told]
    noted = [path.read_text().split() for path in sorted(tmp_path.glob("?-?"))]
    assert len(noted) == 6
    assert len({port for _, _, port in noted}) == 3
    assert not [pid for rank, loader, _ in noted for pid in (rank, loader) if is_running(int(pid))]


def test_a_sweep_ends_what_is_left_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    this, that = (f"{word}-{os.getpid()}" for word in ("this", "that"))  # other tests may run beside this one
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    ours = subprocess.Popen([sys.executable, "-c", deaf], env={**os.environ, "NEOX_RUN": this})
    other = subprocess.Popen([sys.executable, "-c", deaf], env={**os.environ, "NEOX_RUN": that})
    try:
        while sweep.left_behind(this) != [ours.pid]:  # until it has become what it is to be
            time.sleep(0.01)
        assert sweep.main([this]) == 0
        assert ours.wait(240) == -signal.SIGKILL
        assert other.poll() is None
        assert 0 < int(capsys.readouterr().out) < 65536
    finally:
        for process in (ours, other):
            process.kill()
            process.wait()


FAKE_SSH = """#!/bin/sh
for last; do :; done
while [ "$1" != n1 ] && [ "$1" != n2 ] && [ "$1" != n3 ]; do shift; done
[ ! -e {folder}/$1.gone ] || {{ echo "no route to $1" >&2; exit 255; }}
shift
exec sh -c "$*"
"""
RANK = """
import os, pathlib, sys, time
folder, restart = pathlib.Path(sys.argv[1]), os.environ["NEOX_RESTARTS"]
names = ("NEOX_NODE_RANK", "NEOX_SLOTS", "MASTER_ADDR", "MASTER_PORT")
(folder / f"{restart}-{os.environ['NEOX_NODE_RANK']}").write_text(" ".join(os.environ[name] for name in names))
while len(list(folder.glob(f"{restart}-?"))) < len(os.environ["NEOX_SLOTS"].split(",")):
    time.sleep(0.01)
if restart == "0" and os.environ["NEOX_NODE_RANK"] == "1":
    (folder / "n2.gone").touch()
    os.kill(os.getpid(), 9)
time.sleep(60 if restart == "0" else 0)
"""


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Keys of a run on three hosts behind a stand-in for ssh, of which one goes away when its rank is killed."""
    fake = tmp_path / "ssh"
    fake.write_text(FAKE_SSH.format(folder=tmp_path))
    fake.chmod(0o755)
    for module in (ssh, conversation):
        monkeypatch.setattr(module, "SSH", (str(fake),))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in ("n1", "n2", "n3")))
    return {
        "hostfile": str(tmp_path / "hosts"),
        "launcher": "ssh",
        "train_batch_size": 12,
        "elastic": True,
        "save": str(tmp_path / "save"),
        "checkpoint_factor": 1,
        "max_restarts": 2,
    }


def run_on(hosts: dict[str, object], folder: Path) -> int:
    config = configured(**hosts)
    start = Start(config, workers=1, restarts=Restarts.of(config))
    return start.run([str(folder / "rank.py"), str(folder)])


def places(folder: Path, restart: int) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob(f"{restart}-?"))]


def test_an_elastic_run_leaves_out_the_host_that_is_gone(
    hosts: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_on(hosts, tmp_path) == 0
    first, second = places(tmp_path, 0), places(tmp_path, 1)
    assert [place.split()[:3] for place in first] == [[str(rank), "1,1,1", "n1"] for rank in range(3)]
    assert [place.split()[:3] for place in second] == [[str(rank), "1,1", "n1"] for rank in range(2)]
    assert {place.split()[3] for place in first} == {"29500"}
    assert "29500" not in {place.split()[3] for place in second}
    said = capsys.readouterr().err.splitlines()
    assert "status 137; restart 1 of 2" in said
    assert "elastic: n2 is left out, it does not answer over ssh (no route to n2)" in said


def test_hosts_beyond_what_the_batch_can_use(hosts: dict[str, object], tmp_path: Path) -> None:
    """A batch of 4 sequences has no share for each of 3 processes, so 2 of the hosts are used."""
    start = Start(configured(**hosts | {"train_batch_size": 4}), workers=1)
    assert start.world_size == 2
    with pytest.raises(ConfigError, match="cannot be shared by 3"):
        configured(**hosts | {"train_batch_size": 4}).with_world_size(3)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_host_is_waited_for(
    hosts: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    comes_back: bool,
) -> None:
    def back(seconds: float, heard: list[int]) -> bool:
        (tmp_path / "n2.gone").unlink(missing_ok=True)
        return True

    if comes_back:
        monkeypatch.setattr(over_ssh, "pause", back)
    else:
        monkeypatch.setattr(over_ssh, "_SECONDS_FOR_A_HOST", 0.0)
    assert run_on(hosts | {"elastic": False}, tmp_path) == (0 if comes_back else 137)
    said = capsys.readouterr().err
    if comes_back:
        assert re.search(r"^waiting for n2 \(no route to n2\); for \d+ s more$", said, re.MULTILINE)
        assert len(places(tmp_path, 1)) == 3
    else:
        assert "no answer over ssh from n2 (no route to n2) for 0 s; not starting again" in said
        assert not places(tmp_path, 1)


def test_no_host_is_left(hosts: dict[str, object]) -> None:
    with pytest.raises(LaunchError, match="none of its hosts answers over ssh"):
        RunOverSsh(configured(**hosts), {"n1": (0,)}, ["train.py"], {}).usable({})
