"""Mistakes that only several hosts can have: one line, before training."""

import re
import shutil
import sys
from pathlib import Path

from hosts import Cluster
from tiny_run import ROOT, Training

PYTHON = sys.executable


def lines_of(out: str) -> list[str]:
    """What was printed, without the line that tells the launcher and what c10d says of names."""
    return [line for line in out.splitlines() if line and not line.startswith(("launcher:", "[W"))]


def test_port_in_use(two: Cluster, training: Training) -> None:
    script = training.script(two.folder / "never")
    listen = "import socket, time; s = socket.create_server(('', 29640)); print('up', flush=True); time.sleep(600)"
    other = two.start("n1", PYTHON, "-c", listen)
    assert other.stdout is not None
    assert other.stdout.readline() == "up\n"
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29640"}
    status, out = two.run("n1", PYTHON, *script, **rank)
    other.kill()
    other.communicate()
    assert status == 2
    another = "MASTER_PORT, or the key master_port if train.py starts the hosts"
    assert lines_of(out) == [f"master_port: 29640 is in use on n1; set another ({another})"]


def test_unknown_meeting_host(two: Cluster, training: Training) -> None:
    script = training.script(two.folder / "never")
    rank = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n9", "MASTER_PORT": "29650"}
    status, out = two.run("n2", PYTHON, *script, **rank)
    assert status == 2
    assert len(lines_of(out)) == 1
    assert "[rank 1] master_addr: 'n9' is unknown on n2 (" in out


def test_unreachable_host(ssh: Cluster, training: Training) -> None:
    hostfile = ssh.folder / "more-hosts"
    hostfile.write_text("n1 slots=1\nn3 slots=1\n")
    words = training.script(ssh.folder / "never", f"hostfile={hostfile}", "launcher=ssh")
    status, out = ssh.run("n1", PYTHON, *words)
    assert status == 2
    assert len(lines_of(out)) == 1
    assert "no answer over ssh from n3 (ssh: Could not resolve hostname n3" in out


def test_more_ranks_than_the_layout_can_use(ssh: Cluster, training: Training) -> None:
    hostfile = ssh.folder / "three"
    hostfile.write_text("n1 slots=2\nn2 slots=1\n")
    words = training.script(ssh.folder / "never", f"hostfile={hostfile}", "model_parallel_size=2")
    status, out = ssh.run("n1", PYTHON, *words)
    assert status == 2
    assert len(lines_of(out)) == 1
    assert "model_parallel_size" in out


def test_mixed_versions(two: Cluster, training: Training) -> None:
    """The second host runs another state of the code."""
    copy = two.folder / "other-code"
    shutil.copytree(ROOT / "neox", copy / "neox", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", copy)
    with (copy / "neox" / "errors.py").open("a") as file:
        file.write("# changed\n")
    script = training.script(two.folder / "never")
    processes = []
    for number, folder in enumerate((ROOT, copy)):
        rank = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
        meet = {"MASTER_ADDR": "n1", "MASTER_PORT": "29660", "PYTHONPATH": str(folder)}
        words = [PYTHON, str(folder / "train.py"), *script[1:]]
        processes.append(two.start(f"n{number + 1}", *words, **rank, **meet))
    outs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], "\n".join(outs)
    (line,) = [line for out in outs for line in lines_of(out)]
    assert line.startswith("the hosts differ: neox source: ")
    assert " on n1; " in line
    assert line.endswith(" on n2; install the same on all, or share one folder")


def test_a_check_finds_what_is_wrong(ssh: Cluster, training: Training) -> None:
    """One host without the data, a folder that is not shared, and a host that does not answer."""
    hostfile = ssh.folder / "hosts"
    check = [PYTHON, "-m", "neox.launch", "check"]
    small = ["--message-mb", "4", "--write-mb", "8", "--timeout", "240"]
    save = f"save={ssh.folder / 'checked'}"
    status, out = ssh.run("n1", *check, hostfile, training.config, save, *small)
    assert status == 0, out
    assert "2 hosts: go" in out
    for row in ("hosts answer", "code and packages", "clocks", "checkpoint folder", "write rate", "all-reduce"):
        assert row in out
    assert "seen by all hosts" in out
    assert "n1 - n2:" in out
    assert not list((ssh.folder / "checked").glob(".neox*"))

    status, out = ssh.run("n1", *check, hostfile, training.config, save, "data_path=nowhere", *small)
    assert status == 1
    assert "no go" in out
    assert re.search("n1, n2: .*/nowhere.idx: no such file", out)

    (ssh.folder / "more-hosts").write_text("n1 slots=1\nn3 slots=1\n")
    status, out = ssh.run("n1", *check, ssh.folder / "more-hosts", *small)
    assert status == 1
    assert "n3: ssh: Could not resolve hostname" in out


def test_a_check_names_a_cut_link(ssh: Cluster) -> None:
    hostfile = ssh.folder / "hosts"
    ssh.set_link("n2", "down")
    try:
        status, out = ssh.run("n1", PYTHON, "-m", "neox.launch", "check", hostfile, "--timeout", "15")
    finally:
        ssh.set_link("n2", "up")
    assert status == 1
    assert "n2: ssh: connect to host n2 port 22:" in out or "n2: no answer in time" in out
    assert Path(hostfile).read_text().count("slots") == 2
