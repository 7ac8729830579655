"""`python -m neox.launch`: the files that its commands write, and their mistakes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from training.layouts import ADAMW, MODEL, TRAINING

from neox.errors import UserError
from neox.launch.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    MODEL
    | TRAINING
    | ADAMW
    | {"save": "ckpt", "load": "ckpt", "checkpoint_factor": 10, "account": "lab", "data_path": "nowhere"}
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a configuration, a script and a list of hosts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yml").write_text(json.dumps(RUN))
    (tmp_path / "train.py").write_text("")
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a command; status and standard output."""

    def call(*words: str) -> tuple[int, str]:
        return main(list(words)), capsys.readouterr().out

    return call


def test_slurm(run: Callable[..., tuple[int, str]], folder: Path) -> None:
    status, out = run(
        "slurm", "tiny.yml", "--nodes", "2", "log_interval=5", "--gpus-per-node", "4", "--time", "4:00:00"
    )
    assert (status, out) == (0, "tiny.sbatch\n")
    text = (folder / "tiny.sbatch").read_text()
    for line in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=4:00:00", "--account=lab"):
        assert f"#SBATCH {line}\n" in text
    assert f"{sys.executable} -u train.py tiny.yml log_interval=5 requeue_status=75 </dev/null" in text
    assert "neox.launch check" not in text
    assert os.access(folder / "tiny.sbatch", os.X_OK)
    assert (folder / "logs").is_dir()


def test_slurm_with_any_number_of_hosts(run: Callable[..., tuple[int, str]], folder: Path) -> None:
    """A batch of 16 sequences is shared by 4, 8 and 16 processes, and not by 12."""
    words = ["tiny.yml", "elastic=true", "--nodes", "1-5", "--gpus-per-node", "4", "requeue_status=7"]
    assert run("slurm", *words) == (0, "tiny.sbatch\n")
    text = (folder / "tiny.sbatch").read_text()
    assert "#SBATCH --nodes=1-4\n" in text
    assert "for choice in 1 2 4; do" in text
    assert 'srun --kill-on-bad-exit=1 $cores --nodes="$nodes" --ntasks=$((nodes * 4)) ' in text
    assert "elastic=true requeue_status=7 requeue_status=7 </dev/null" in text


def test_slurm_with_a_check(run: Callable[..., tuple[int, str]], folder: Path) -> None:
    words = ["tiny.yml", "preflight=true", "--nodes", "2", "--gpus-per-node", "0", "--account", "mine", "-o", "job"]
    assert run("slurm", *words) == (0, "job\n")
    text = (folder / "job").read_text()
    assert "-m neox.launch check --slurm tiny.yml preflight=true || exit 1\n" in text
    assert "#SBATCH --account=mine\n" in text
    assert "#SBATCH --ntasks-per-node=1\n" in text


@pytest.mark.parametrize("kind", ["jobset", "pytorchjob"])
def test_kubernetes(run: Callable[..., tuple[int, str]], folder: Path, kind: str) -> None:
    words = ["tiny.yml", "--nodes", "2", "--gpus-per-node", "4", "--image", "neox", "--name", "My_Run", "--kind", kind]
    assert run("kubernetes", *words) == (0, "my-run.yaml\n")
    text = (folder / "my-run.yaml").read_text()
    assert "&" not in text
    assert yaml.safe_load(text)["metadata"] == {"name": "my-run"}
    # That a pod which has to leave its host is not taken for done.
    assert "requeue_status=75" in text
    assert "auto_resume=true" in text
    assert run("kubernetes", *words, "requeue_status=99") == (0, "my-run.yaml\n")
    assert "requeue_status=75" not in (folder / "my-run.yaml").read_text()


def test_hostfile(run: Callable[..., tuple[int, str]], folder: Path) -> None:
    assert run("hostfile", "hosts", "tiny.yml", "launcher=ssh", "-o", "go.sh") == (0, "go.sh\n")
    (folder / "train.py").write_text("import os, sys; print(os.getcwd(), *sys.argv[1:])")
    done = subprocess.run([str(folder / "go.sh")], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder} tiny.yml launcher=ssh hostfile={folder}/hosts\n"
    assert "# 2 hosts by ssh\n" in (folder / "go.sh").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cook"], "unknown command 'cook'; there are slurm, kubernetes"),
        (["slurm", "--nodes", "2"], "required: CONFIG"),
        (["slurm", "tiny.yml"], "required: --nodes"),
        (["slurm", "tiny.yml", "--nodes", "0"], "--nodes 0: give a number of hosts, from 1 to 9999"),
        (["slurm", "tiny.yml", "--nodes", "9" * 5000], "give a number of hosts, from 1 to 9999"),
        (["slurm", "tiny.yml", "--nodes", "2", "--tasks-per-node", "9"], "a host has 8 GPUs"),
        (["slurm", "tiny.yml", "--nodes", "2", "--tasks-per-node", "-3"], "-3 is not a whole number of at least 1"),
        (["slurm", "tiny.yml", "--nodes", "2", "--max-restarts", "-1"], "-1 is not a whole number of at least 0"),
        (["slurm", "tiny.yml", "--nodes", "2", "--logs", "tiny.yml/logs"], "--logs tiny.yml/logs: cannot be made"),
        (["slurm", "tiny.yml", "--nodes", "3", "--gpus-per-node", "3"], "train_batch_size"),
        (["slurm", "tiny.yml", "--nodes", "2", "pipe_parallel_size=3"], "pipe_parallel_size"),
        (["slurm", "tiny.yml", "--nodes", "1", "--script", "nothing.py"], "nothing.py: no such file"),
        (["slurm", "tiny.yml", "--nodes", "1-2"], "--nodes 1-2: a range is for runs with elastic: true"),
        (["slurm", "tiny.yml", "--nodes", "2-1", "elastic=true"], "--nodes 2-1: give a number of hosts"),
        (["slurm", "tiny.yml", "--nodes", "5-6", "elastic=true"], "48 data-parallel ranks; start one of .* processes"),
        (["slurm", "tiny.yml", "--nodes", "1", "load=elsewhere", "auto_resume=false"], "auto_resume: false, and load"),
        (["kubernetes", "tiny.yml", "--nodes", "1-2", "--image", "x", "elastic=true"], "a set of pods has one size"),
        (["kubernetes", "tiny.yml", "--nodes", "1"], "required: --image"),
        (["hostfile", "nowhere", "tiny.yml"], "nowhere: cannot be read"),
        (["hostfile", "hosts", "tiny.yml", "model_parallel_size=4", "num_gpus=1"], "model_parallel_size"),
        (["check"], "no HOSTFILE given"),
        (["check", "hosts", "--timeout", "0"], "--timeout: 0 is not a whole number of at least 1"),
        (["check", "--slurm"], "no Slurm job around us"),
        (["check", "tiny.yml"], "tiny.yml:1: .* is not `HOST slots=N`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(UserError, match=message) as error:
        main(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (["kubernetes", "mine.yaml", "--nodes", "1", "--image", "x"], "mine.yaml"),  # the default name
        (["slurm", "-d", ".", "mine", "--nodes", "1", "-o", "mine.yaml"], "mine.yaml"),
        (["slurm", "mine.yaml", "--nodes", "1", "-o", "train.py"], "train.py"),
        (["hostfile", "hosts", "mine.yaml", "-o", "./hosts"], "hosts"),
    ],
)
def test_no_file_of_the_command_line_is_replaced(words: list[str], file: str, folder: Path) -> None:
    (folder / "tiny.yml").rename(folder / "mine.yaml")
    before = (folder / file).read_text()
    with pytest.raises(UserError, match=rf"^(\./)?{file}: is read too"):
        main(words)
    assert (folder / file).read_text() == before


def test_a_job_without_checkpoints(folder: Path) -> None:
    (folder / "tiny.yml").write_text(json.dumps({k: v for k, v in RUN.items() if k not in ("save", "load")}))
    with pytest.raises(UserError, match="save: a job that starts again"):
        main(["slurm", "tiny.yml", "--nodes", "1"])
    assert main(["slurm", "tiny.yml", "--nodes", "1", "--no-requeue", "--max-restarts", "0"]) == 0


def test_help_and_status() -> None:
    command = [sys.executable, "-m", "neox.launch"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, env=environ)
    assert "slurm       write a batch file" in done.stdout
    done = subprocess.run([*command, "cook"], capture_output=True, text=True, check=False, env=environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
