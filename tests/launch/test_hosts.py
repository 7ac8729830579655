"""Hosts of a run: which the hostfile and the configuration choose, and the command that starts them."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import Config, config_from_dict
from neox.errors import LaunchError
from neox.launch import hosts, ssh
from neox.launch.hostfile import check_hostfile, choose, hostfile_path, read_hostfile
from neox.launch.hosts import carried_variables, chosen_hosts, start_command, wants_launcher
from neox.launch.start import Start

BASE = MODEL | TRAINING | ADAMW
HOSTS = "one slots=8\n# a remark\n\ntwo slots=4  # half\nthree slots=8\n"


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text(HOSTS)
    return path


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launcher is installed."""
    monkeypatch.setattr(hosts.shutil, "which", lambda program: f"/usr/bin/{program}")


def test_a_hostfile_that_is_named_and_missing(hostfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for many hosts must not become one of this machine; the usual place may be empty, and ranks do not ask."""
    missing = tmp_path / "hosts_1234"
    with pytest.raises(LaunchError, match=f"hostfile: no such file {missing}; .*hostfile: null"):
        Start(configured(missing), workers=1)
    monkeypatch.setenv("DLTS_HOSTFILE", str(missing))
    with pytest.raises(LaunchError, match=f"DLTS_HOSTFILE: no such file {missing}; .*unset DLTS_HOSTFILE"):
        Start(configured(None), workers=1)
    check_hostfile(configured(hostfile), {"DLTS_HOSTFILE": str(missing)})
    monkeypatch.delenv("DLTS_HOSTFILE")
    monkeypatch.setattr("neox.launch.hostfile.USUAL_HOSTFILE", str(missing))
    assert Start(configured(None), workers=1).is_alone
    for name, value in {"NEOX_NODE_RANK": "0", "NEOX_SLOTS": "1,1", "MASTER_ADDR": "n1"}.items():
        monkeypatch.setenv(name, value)  # this host was started by something that has read the file
    Start(configured(missing), workers=1)


def configured(hostfile: Path | None, **keys: Any) -> Config:
    given = {} if hostfile is None else {"hostfile": str(hostfile)}
    return config_from_dict(BASE | given | keys, world_size=None)


def test_nothing_asked() -> None:
    assert not wants_launcher(config_from_dict(BASE))
    start = Start(config_from_dict(BASE), workers=3)
    assert (start.world_size, start.is_alone) == (3, False)
    assert start.description == "launcher: none; 3 processes on this machine"
    assert Start(config_from_dict(BASE), workers=1).is_alone


def test_several_hosts_that_nothing_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They must not become this one."""
    monkeypatch.setattr("neox.launch.hostfile.USUAL_HOSTFILE", str(tmp_path / "none"))
    with pytest.raises(LaunchError, match="num_nodes: 2 hosts are asked for, and no hostfile names them"):
        Start(configured(None, num_nodes=2), workers=1)
    assert Start(configured(None, num_nodes=1), workers=1).is_alone
    for name, value in {"NEOX_NODE_RANK": "0", "NEOX_SLOTS": "1,1", "MASTER_ADDR": "n1"}.items():
        monkeypatch.setenv(name, value)  # something has started each host
    assert Start(configured(None, num_nodes=2), workers=1).world_size == 2


def test_a_byte_order_mark_before_the_hosts_is_dropped(hostfile: Path) -> None:
    whole = read_hostfile(hostfile)
    hostfile.write_text("\ufeff" + HOSTS, encoding="utf-8")
    assert read_hostfile(hostfile) == whole


def test_places_of_the_hostfile(hostfile: Path, tmp_path: Path) -> None:
    assert hostfile_path(configured(None), {"DLTS_HOSTFILE": str(hostfile)}) == hostfile
    assert hostfile_path(configured(hostfile), {"DLTS_HOSTFILE": str(tmp_path / "other")}) == hostfile
    assert hostfile_path(configured(None), {"DLTS_HOSTFILE": str(tmp_path / "other")}) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("one 8\n", ":1: 'one 8' is not"),
        ("one slots=8\ntwo slots=many\n", ":2:"),
        ("one slots=0\n", ":1:"),
        ("one slots=99999999999\n", ":1: .* N from 1 to 9999"),
        ("one\0 slots=1\n", ":1:"),
        ("-oProxyCommand=id slots=1\n", ":1:"),
        ("one slots = 2\n", ":1:"),
        ("one slots=1\none slots=2\n", ":2: one is there a second time"),
        ("# nobody\n", "no host in it"),
    ],
    ids=["no slots", "no number", "zero", "too many", "null", "option", "spaces", "twice", "empty"],
)
def test_bad_hostfile(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(LaunchError, match=words) as error:
        read_hostfile(path)
    assert "\n" not in str(error.value)


def test_a_hostfile_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be read"):
        read_hostfile(tmp_path)


@pytest.mark.parametrize(
    ("keys", "counts"),
    [
        ({}, {"one": 8, "two": 4, "three": 8}),
        ({"num_nodes": 2}, {"one": 8, "two": 4}),
        ({"num_gpus": 6}, {"one": 6, "two": 4, "three": 6}),
        ({"num_nodes": 2, "num_gpus": 2}, {"one": 2, "two": 2}),
        ({"include": "three@one:0,2"}, {"one": 2, "three": 8}),
        ({"include": "three:1@three:0"}, {"three": 2}),
        ({"include": "three@one:0,2", "num_gpus": 1}, {"one": 1, "three": 1}),
        ({"exclude": "two"}, {"one": 8, "three": 8}),
        ({"exclude": "two:0,3@one", "num_nodes": 1}, {"two": 2}),
    ],
    ids=str,
)
def test_choice(hostfile: Path, keys: dict[str, Any], counts: dict[str, int]) -> None:
    config = configured(hostfile, **keys)
    chosen = choose(read_hostfile(hostfile), config)
    assert {host: len(slots) for host, slots in chosen.items()} == counts
    assert list(chosen) == [host for host in ("one", "two", "three") if host in counts]
    assert Start(config, workers=1).world_size == sum(counts.values())


def test_choice_of_slots(hostfile: Path) -> None:
    pool = read_hostfile(hostfile)
    assert choose(pool, configured(hostfile, include="one:5,2"))["one"] == (2, 5)
    assert choose(pool, configured(hostfile, exclude="two:1"))["two"] == (0, 2, 3)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"include": "four"}, "include: host 'four' is not in the hostfile"),
        ({"exclude": "two:4"}, "exclude: two has slots 0 to 3, not 4"),
        ({"include": "two:a"}, "is not HOST:SLOT"),
        ({"include": f"two:{'9' * 5000}"}, "is not HOST:SLOT"),
        ({"exclude": "one@two@three"}, "leaves no host"),
        ({"num_nodes": 4}, "num_nodes: 4 hosts are asked for, and there are 3"),
    ],
    ids=str,
)
def test_bad_choice(hostfile: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        choose(read_hostfile(hostfile), configured(hostfile, **keys))


def command_for(hostfile: Path, environ: dict[str, str] | None = None, **keys: Any) -> list[str]:
    config = configured(hostfile, **keys)
    found = environ or {}
    return start_command(config, chosen_hosts(config, found), ["train.py", "model.yml"], found)


@pytest.mark.usefixtures("programs")
def test_deepspeeds_launcher(hostfile: Path) -> None:
    command = command_for(hostfile, {"MASTER_ADDR": "10.0.0.1"}, num_nodes=2, num_gpus=2, force_multi=True)
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"]
    assert command[-2:] == ["train.py", "model.yml"]
    from deepspeed.launcher.runner import fetch_hostfile, parse_args, parse_inclusion_exclusion

    options = parse_args(command[3:])
    assert (options.launcher, options.master_addr, options.master_port) == ("pdsh", "10.0.0.1", 29500)
    assert options.force_multi
    assert options.no_ssh_check
    # DeepSpeed comes to the same choice.
    chosen = parse_inclusion_exclusion(fetch_hostfile(options.hostfile), options.include, options.exclude)
    assert dict(chosen) == {"one": [0, 1], "two": [0, 1]}


@pytest.mark.usefixtures("programs")
def test_master_address_of_the_configuration_outranks_the_variable(hostfile: Path) -> None:
    command = command_for(hostfile, {"MASTER_ADDR": "10.0.0.1"}, master_addr="10.0.0.2", master_port=1234)
    assert "--master_addr=10.0.0.2" in command
    assert "--master_port=1234" in command


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("keys", [{"launcher": "OpenMPI"}, {"deepspeed_mpi": True}], ids=str)
def test_open_mpi(hostfile: Path, keys: dict[str, Any]) -> None:
    command = command_for(hostfile, {"NCCL_DEBUG": "INFO", "SECRET": "x"}, **keys)
    assert command[:5] == ["mpirun.openmpi", "-n", "20", "--host", "one:8,two:4,three:8"]
    assert command[-4:] == [sys.executable, "-u", str(Path("train.py").absolute()), "model.yml"]
    exported = [command[i + 1] for i, word in enumerate(command) if word == "-x"]
    assert {"NCCL_DEBUG=INFO", "MASTER_ADDR=one", "MASTER_PORT=29500"} <= set(exported)
    assert "SECRET" not in " ".join(command)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("launcher", ["mpich", "mvapich"])
def test_hydra(hostfile: Path, launcher: str) -> None:
    command = command_for(hostfile, launcher=launcher)
    assert command[:5] == ["mpiexec.hydra", "-n", "20", "-hosts", "one:8,two:4,three:8"]
    assert command[command.index("MASTER_ADDR") - 1 : command.index("MASTER_ADDR") + 2] == [
        "-genv",
        "MASTER_ADDR",
        "one",
    ]


@pytest.mark.usefixtures("programs")
def test_srun_with_account_and_comment(hostfile: Path) -> None:
    command = command_for(hostfile, deepspeed_slurm=True, num_gpus=4, account="lab", comment="two words")
    assert command[:2] == ["srun", "--nodes=3"]
    assert not any(word.startswith(("--cpus-per-task", "--export")) for word in command)
    meeting = command_for(hostfile, launcher="slurm", num_gpus=4, master_addr="n0", master_port=1234)
    assert "--export=ALL,MASTER_ADDR=n0,MASTER_PORT=1234" in meeting
    assert "--cpus-per-task=6" in command_for(hostfile, {"SLURM_CPUS_PER_TASK": "6"}, launcher="slurm", num_gpus=4)
    for option in ("--ntasks=12", "--ntasks-per-node=4", "--nodelist=one,two,three", "--account=lab"):
        assert option in command
    assert "--comment=two words" in command
    with pytest.raises(LaunchError, match="8 on one, 4 on two, 8 on three; set num_gpus"):
        command_for(hostfile, launcher="slurm")


@pytest.mark.usefixtures("programs")
def test_srun_inside_an_allocation() -> None:
    job = {"SLURM_JOB_NODELIST": "n[07-08]", "SLURM_GPUS_ON_NODE": "4"}
    config = config_from_dict(BASE | {"deepspeed_slurm": True}, world_size=None)
    assert chosen_hosts(config, job) == {"n07": (0, 1, 2, 3), "n08": (0, 1, 2, 3)}
    less = config_from_dict(BASE | {"deepspeed_slurm": True, "num_gpus": 2, "num_nodes": 1}, world_size=None)
    assert chosen_hosts(less, job) == {"n07": (0, 1)}
    with pytest.raises(LaunchError, match="num_gpus"):
        chosen_hosts(config, {"SLURM_JOB_NODELIST": "n[07-08]"})


@pytest.mark.usefixtures("programs")
def test_slots_that_a_launcher_cannot_be_told(hostfile: Path) -> None:
    with pytest.raises(LaunchError, match="openmpi cannot be told which slots"):
        command_for(hostfile, include="one:1,3", launcher="openmpi")
    assert "--include=one:1,3" in command_for(hostfile, include="one:1,3", launcher="pdsh")


def test_the_launcher_takes_our_place(hostfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal to train.py is one to mpirun, and nothing is left in between that could die and leave it."""
    program, said = tmp_path / "mpirun.openmpi", tmp_path / "said"
    program.write_text(f"#!/bin/sh\necho $$ >{said}\nexit 7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    start = Start(configured(hostfile, launcher="openmpi", no_ssh_check=True, train_batch_size=20), workers=1)
    child = os.fork()
    if child == 0:
        start.run(["train.py", "model.yml"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert int(said.read_text()) == child


def test_a_launcher_that_is_not_installed(hostfile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts.shutil, "which", lambda program: None)
    with pytest.raises(LaunchError, match="pdsh, which is not installed here; set launcher: ssh"):
        command_for(hostfile)


@pytest.mark.parametrize(
    ("key", "word"), [("deepspeed_slurm", "srun"), ("deepspeed_mpi", "mpirun"), ("force_multi", "mpirun")]
)
def test_no_hosts_to_start_on(key: str, word: str) -> None:
    config = config_from_dict(BASE | {key: True}, world_size=None)
    with pytest.raises(LaunchError, match=f"{key}: start the script with `{word}"):
        chosen_hosts(config, {})


def test_variables_for_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text('# a remark\nFOO=bar\nNCCL_DEBUG="WARN"\n\n')
    given = {"NCCL_DEBUG": "INFO", "PYTHONPATH": "/code", "PATH": "/bin"}
    assert carried_variables(given) == {"NCCL_DEBUG": "WARN", "PYTHONPATH": "/code", "FOO": "bar"}
    (tmp_path / "mine").write_text("\ufeffFOO=mine\n", encoding="utf-8")
    assert carried_variables({"DS_ENV_FILE": str(tmp_path / "mine")}) == {"FOO": "mine"}
    monkeypatch.chdir("/")
    assert carried_variables({"DS_ENV_FILE": "mine"}) == {"FOO": "mine"}  # as DeepSpeed finds it, in the home folder


@pytest.mark.parametrize(
    ("content", "mistake"),
    [
        (b"FOO=caf\xe9\n", "mine: cannot be read as a list of variables .*; write lines NAME=value"),
        (b"A=1\nFOO='bar\n", "mine:2: FOO: no closing quotation; close the quotes"),
        (b"FOO\n", "mine:1: 'FOO' is not NAME=value; correct the line or leave it out"),
        (b"export FOO=bar\n", "mine:1: 'export FOO=bar' is not NAME=value"),
        (b"FOO=a\0b\n", "mine:1: .* is not NAME=value"),
        (None, "DS_ENV_FILE: no such file .*mine; correct it, or unset DS_ENV_FILE"),
    ],
    ids=["latin-1", "quotes", "no-value", "export", "null", "missing"],
)
def test_a_list_of_variables_that_is_none(content: bytes | None, mistake: str, tmp_path: Path) -> None:
    """Other hosts would run with other settings than was asked for."""
    path = tmp_path / "mine"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LaunchError, match=mistake):
        carried_variables({"DS_ENV_FILE": str(path)})


def test_hosts_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ssh that knows one host."""
    fake = tmp_path / "ssh"
    answer = 'for word; do [ "$word" = one ] && exit 0; done'
    fake.write_text(f"#!/bin/sh\n{answer}\nprintf 'caf\\351\\n' >&2\necho refused >&2\nexit 255\n")
    fake.chmod(0o755)
    monkeypatch.setattr(ssh, "SSH", (str(fake),))
    ssh.check_reachable(["one"])
    with pytest.raises(LaunchError, match=r"no answer over ssh from two \(refused\); three \(refused\)") as error:
        ssh.check_reachable(["one", "two", "three"])
    assert "\n" not in str(error.value)
