"""train.py loses a rank to SIGKILL and is started again: by itself, and by torchrun with nothing else set."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import free_port
from scripts_of import fork_script
from training.layouts import ADAMW, MODEL, TRAINING, write_corpus

ROOT = Path(__file__).parents[2]
SCRIPT = "tests/held_train.py"
STEPS = 30


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restarts")
    flat = {"data_path": write_corpus(folder / "corpus_text_document"), "checkpoint_factor": 5, "train_iters": STEPS}
    path = folder / "model.yml"
    path.write_text(json.dumps(MODEL | TRAINING | ADAMW | flat | {"log_interval": 1, "save": str(folder / "whole")}))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> dict[int, float]:
    """Losses of one process that nobody disturbs, by step."""
    done = fork_script("train.py", config)
    assert done.returncode == 0, done.stderr
    return losses(config.parent / "whole")


def losses(save: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["train/lm_loss"] for record in records if "train/lm_loss" in record}


def rank_1(parents: list[int]) -> int | None:
    """The process of rank 1 among the children of these."""
    for parent in parents:
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if b"RANK=1" in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    return int(child)
    return None


def newest(save: Path) -> int:
    latest = save / "latest"
    return int(latest.read_text().removeprefix("global_step")) if latest.exists() else 0


def resumptions(outs: list[str]) -> list[int]:
    """Iterations from which the run was taken up."""
    return [int(step) for out in outs for step in re.findall(r"resume .*: iteration (\d+),", out)]


def run_and_kill(commands: list[list[str]], save: Path, *, kills: tuple[int, ...], hold: Path) -> list[str]:
    """Start the commands, and kill rank 1 when there is a checkpoint of each of `kills`; what each prints."""
    logs = [save.with_name(f"{save.name}-{number}.log") for number in range(len(commands))]
    hold.touch()
    processes = []
    for command, path in zip(commands, logs, strict=True):
        with path.open("w") as log:
            environ = {**os.environ, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + 900
        for number, step in enumerate(kills):
            while newest(save) < step or len(resumptions([log.read_text() for log in logs])) < number:
                assert time.monotonic() < deadline, "no checkpoint in time"
                assert None in [process.poll() for process in processes], logs[0].read_text()[-3000:]
                time.sleep(0.02)
            rank = rank_1([process.pid for process in processes])
            assert rank is not None
            os.kill(rank, signal.SIGKILL)
        hold.unlink()
        statuses = [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    out = [path.read_text() for path in logs]
    assert statuses == [0] * len(commands), "\n".join(text[-3000:] for text in out)
    return out


def check(save: Path, undisturbed: dict[int, float], outs: list[str], *, kills: tuple[int, ...]) -> None:
    """The run is done, with the losses that it would have had, and went on after each kill where it had been saved."""
    assert newest(save) == STEPS
    found = losses(save)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(undisturbed, abs=1e-5)
    resumed = resumptions(outs)
    assert len(resumed) == len(kills)
    for step, begun in zip(kills, sorted(resumed), strict=True):
        assert step <= begun < STEPS


def test_by_itself(tmp_path: Path, config: Path, undisturbed: dict[int, float]) -> None:
    save, kills = tmp_path / "run", (5,)
    words = [sys.executable, SCRIPT, str(config), f"save={save}", "num_gpus=2", "max_restarts=1"]
    outs = run_and_kill([words], save, kills=kills, hold=config.with_name("hold"))
    check(save, undisturbed, outs, kills=kills)
    # 3 where the launcher first sees the rank that the watch ended.
    assert len(re.findall(r"^status (?:137|3); restart 1 of 1$", outs[0], flags=re.MULTILINE)) == 1


def test_torchrun(tmp_path: Path, config: Path, undisturbed: dict[int, float]) -> None:
    """Two agents, whose ranks meet in a store that outlives them."""
    save, kills = tmp_path / "run", (5, 15)
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "restarts"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meet]
    command = [*start, "--max-restarts", "2", SCRIPT, str(config), f"save={save}"]
    outs = run_and_kill([command, command], save, kills=kills, hold=config.with_name("hold"))
    check(save, undisturbed, outs, kills=kills)
