"""Slurm batch files: what they ask for, and what the script does; its srun and scontrol are stand-ins here."""

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from neox.errors import LaunchError
from neox.launch.slurm import Job, batch_file, submit, write_batch_file

JOB = Job(name="pythia", nodes=[12], tasks_per_node=8, gpus_per_node=8, command=["train.py", "a.yml", "x=a b"])


def options(text: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")}


def test_options(tmp_path: Path) -> None:
    asked = options(batch_file(JOB, folder=tmp_path))
    assert asked == {
        "--job-name=pythia",
        "--nodes=12",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        f"--output={tmp_path}/logs/%x-%j.out",
        "--open-mode=append",
        "--signal=B:USR1@300",
        "--requeue",
    }


def test_more_options(tmp_path: Path) -> None:
    job = Job(
        name="x",
        nodes=[1],
        tasks_per_node=1,
        gpus_per_node=0,
        command=["train.py"],
        check=["a.yml"],
        time="2-00:00:00",
        partition="gpu",
        account="lab",
        comment="two words",
        cpus_per_task=12,
        warning=60,
        requeue=False,
        sbatch=["--qos=high"],
        srun=["--mpi=none"],
    )
    text = batch_file(job, folder=tmp_path, python="python")
    asked = options(text)
    assert {"--time=2-00:00:00", "--partition=gpu", "--account=lab", "--comment='two words'"} <= asked
    assert {"--cpus-per-task=12", "--signal=B:USR1@60", "--no-requeue", "--qos=high"} <= asked
    assert not any(option.startswith("--gpus") for option in asked)
    assert "python -m neox.launch check --slurm a.yml || exit 1" in text
    assert "srun --kill-on-bad-exit=1 $cores --mpi=none python -u train.py" in text


class Slurm:
    """Stand-ins for Slurm's programs, and one batch file that uses them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        (folder / "bin").mkdir()
        self.program("scontrol", f'echo "scontrol $*" >> {self.calls}')

    def program(self, name: str, script: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def start(self, job: Job = JOB, **variables: str) -> "subprocess.Popen[str]":
        path = self.folder / "job.sbatch"
        write_batch_file(job, path, folder=self.folder)
        environ = os.environ | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "77"} | variables
        return subprocess.Popen([str(path)], env=environ, stderr=subprocess.PIPE, text=True)

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.is_file() else []

    def wait_for_calls(self, number: int) -> None:
        deadline = time.monotonic() + 240
        while len(self.called()) < number:
            assert time.monotonic() < deadline, self.called()
            time.sleep(0.02)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_a_run_that_ends(slurm: Slurm) -> None:
    slurm.program("srun", f'echo "srun $*" >> {slurm.calls}')
    assert slurm.start().wait(240) == 0
    (call,) = slurm.called()
    assert call.startswith("srun --kill-on-bad-exit=1 ")
    assert call.endswith(" -u train.py a.yml x=a b")


def test_processes_get_the_cores_that_were_asked_for(slurm: Slurm) -> None:
    """Slurm's srun does not look at this variable of the job."""
    slurm.program("srun", f'echo "srun $*" >> {slurm.calls}')
    assert slurm.start(SLURM_CPUS_PER_TASK="12").wait(30) == 0
    assert slurm.called()[0].startswith("srun --kill-on-bad-exit=1 --cpus-per-task=12 ")


def test_a_run_that_fails_is_started_again(slurm: Slurm) -> None:
    slurm.program("sleep", f'echo "pause $1" >> {slurm.calls}')
    count = f"$(grep -c srun {slurm.calls})"
    slurm.program("srun", f'echo "srun restarts=$NEOX_RESTARTS" >> {slurm.calls}; [ {count} -eq 3 ] || exit 134')
    job = slurm.start()
    _, said = job.communicate(timeout=240)
    assert job.returncode == 0
    pauses = ["pause 1", "pause 2"]
    assert slurm.called() == ["srun restarts=", pauses[0], "srun restarts=1", pauses[1], "srun restarts=2"]
    assert said.splitlines() == ["status 134; restart 1 of 3", "status 134; restart 2 of 3"]


def test_a_run_that_always_fails(slurm: Slurm) -> None:
    slurm.program("sleep", ":")
    slurm.program("srun", f"echo srun >> {slurm.calls}; exit 134")
    assert slurm.start().wait(240) == 134
    assert slurm.called() == ["srun"] * 4


def test_checkpoints_between_them_forgive_failures(slurm: Slurm) -> None:
    slurm.program("sleep", ":")
    run = f"echo srun >> {slurm.calls}; n=$(wc -l < {slurm.calls}); [ $n -lt 6 ] || exit 0"
    # The first three make one each.
    slurm.program("srun", f"{run}; [ $n -gt 3 ] || echo global_step$n > save/latest; exit 3")
    (slurm.folder / "save").mkdir()
    job = slurm.start(replace(JOB, save=Path("save"), max_restarts=3))
    _, said = job.communicate(timeout=240)
    assert job.returncode == 0
    assert said.splitlines() == [f"status 3; restart {number} of 3" for number in (1, 1, 1, 2, 3)]
    assert slurm.called() == ["srun"] * 6


def test_turns_without_a_checkpoint_end(slurm: Slurm) -> None:
    """A job that is requeued again and again gets on, or ends; and then nothing of it is left."""
    slurm.program("srun", "exit 75")
    job = replace(JOB, save=Path("save"), max_restarts=1)
    (slurm.folder / "save").mkdir()
    assert slurm.start(job).wait(240) == 0
    assert slurm.start(job).wait(240) == 75
    slurm.program("srun", "echo global_step5 > save/latest; exit 75")
    assert slurm.start(job).wait(240) == 0
    assert slurm.called() == ["scontrol requeue 77"] * 2
    slurm.program("srun", "exit 0")
    assert slurm.start(job).wait(240) == 0
    assert not list((slurm.folder / "logs").iterdir())


def test_an_elastic_job_uses_the_most_hosts_it_can(slurm: Slurm) -> None:
    slurm.program("srun", f'echo "$*" >> {slurm.calls}')
    assert slurm.start(replace(JOB, nodes=[1, 2, 4]), SLURM_JOB_NUM_NODES="3").wait(240) == 0
    assert slurm.called()[0].startswith("--kill-on-bad-exit=1 --nodes=2 --ntasks=16 ")


def test_a_run_that_ended_at_its_own_time_limit_is_requeued(slurm: Slurm) -> None:
    slurm.program("srun", f"echo srun >> {slurm.calls}; exit 75")
    assert slurm.start(JOB).wait(240) == 0
    assert slurm.called() == ["srun", "scontrol requeue 77"]


def test_a_mistake_is_not_tried_again(slurm: Slurm) -> None:
    # srun's status is the highest of its processes': of those that it ended, not of the one with the mistake.
    slurm.program("srun", f'echo srun >> {slurm.calls}; printf 2 > "$NEOX_ERROR_LOCK"; exit 143')
    assert slurm.start().wait(240) == 2
    assert slurm.called() == ["srun"]
    assert not list((slurm.folder / "logs").iterdir())


@pytest.mark.parametrize("status", [0, 75, 138])
def test_a_warned_job_is_requeued_unless_the_run_is_done(slurm: Slurm, status: int) -> None:
    """The step is told, has its time, and the job goes back to the queue once."""
    trap = f"trap 'sleep 0.3; echo saved >> {slurm.calls}; exit {status}' USR1"
    slurm.program("srun", f"{trap}; echo srun >> {slurm.calls}; for i in $(seq 600); do sleep 0.05; done")
    job = slurm.start()
    slurm.wait_for_calls(1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(240) == 0
    assert slurm.called() == ["srun", "saved"] + (["scontrol requeue 77"] if status else [])


def test_a_warned_job_that_may_not_requeue_ends(slurm: Slurm) -> None:
    script = f"trap 'exit 0' USR1; echo srun >> {slurm.calls}; for i in $(seq 600); do sleep 0.05; done"
    slurm.program("srun", script)
    job = slurm.start(Job("x", [1], 1, 1, ["train.py"], requeue=False))
    slurm.wait_for_calls(1)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(240) == 0
    assert slurm.called() == ["srun"]


def test_submit(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{slurm.folder}/bin:{os.environ['PATH']}")
    slurm.program("sbatch", 'echo "4711;cluster"')
    assert submit(Path("job.sbatch")) == "4711"
    slurm.program("sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    with pytest.raises(LaunchError, match=r"job\.sbatch: sbatch refused it: sbatch: error: invalid partition"):
        submit(Path("job.sbatch"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="sbatch is not installed here"):
        submit(Path("job.sbatch"))
