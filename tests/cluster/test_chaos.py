"""Ten faults of seven kinds strike a run of 200 steps, which nobody looks after."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from chaos import BATCH, REQUEUE, STEPS, Chaos, Keeper, plan, table
from hosts import NAMES, Cluster
from tiny_run import ROOT
from training.layouts import ADAMW, MODEL, TRAINING, write_corpus

from neox.checkpoint.native.integrity import damages

SCRIPT = str(ROOT / "tests" / "cluster" / "faulty_train.py")
SEED = "NEOX_CHAOS_SEED"
"""Variable that repeats a run's faults."""

RELIABILITY = {
    "requeue_status": REQUEUE,
    "distributed_timeout": 20,
    "max_restarts": 3,
    "on_bad_loss": "skip_batch",
    "replica_check_interval": 3,
    "on_replica_mismatch": "rewind",
    "io_retry_time": 60,
}


def configuration(folder: Path, save: Path) -> Path:
    """A configuration file, with a folder for faults beside it."""
    faults = folder / "faults"
    faults.mkdir(parents=True)
    (faults / "poison.json").write_text("[]")
    run = {"data_path": write_corpus(folder / "corpus_text_document"), "save": str(save), "load": str(save)}
    run |= {"train_iters": STEPS, "train_batch_size": BATCH, "checkpoint_factor": 10, "keep_last_n_checkpoints": 2}
    run |= {"log_interval": 1, "model_parallel_size": 2}
    path = folder / "chaos.yml"
    path.write_text(json.dumps(MODEL | TRAINING | ADAMW | run | RELIABILITY, indent=1))
    return path


def curve(save: Path) -> dict[int, float]:
    """Losses by step, the last line of a step counting."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: float(record["train/lm_loss"]) for record in records if "train/lm_loss" in record}


def test_a_run_outlives_ten_faults(ssh: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get(SEED) or time.time())
    faults = plan(seed)
    save, calm = ssh.small_disk / "run", ssh.folder / "calm-run"
    config = configuration(ssh.folder / "chaos", save)
    poisoned = sorted(fault.place for fault in faults if fault.kind == "nan")
    (config.parent / "faults" / "poison.json").write_text(json.dumps(poisoned))
    hostfile = ssh.folder / "chaos-hosts"
    hostfile.write_text("".join(f"{name} slots=2\n" for name in NAMES))
    command = [sys.executable, SCRIPT, config, "launcher=ssh", f"hostfile={hostfile}", "master_port=29710"]

    keeper = Keeper(lambda: ssh.start("n1", *command))
    chaos = Chaos(ssh, keeper, script=SCRIPT, save=save, faults=config.parent / "faults")
    try:
        for fault in faults:
            chaos.inflict(fault)
        keeper.finish()
    finally:
        chaos.end()
        with capsys.disabled():
            print(f"\n{SEED}={seed}\n{table(faults)}")
    assert keeper.status == 0, keeper.tail()
    assert len(keeper.starts) == 3, "the run was only asked to end twice"

    found = curve(save)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert (save / "latest").read_text() == f"global_step{STEPS}"
    assert damages(save / f"global_step{STEPS}") == []
    left_out = json.loads((save / "left_out.json").read_text())["left_out"]
    assert [[place // BATCH * BATCH, (place // BATCH + 1) * BATCH] for place in poisoned] == left_out

    # The same run without a fault, which leaves out the same two batches on purpose.
    calm.mkdir()
    shutil.copy(save / "left_out.json", calm)
    script = [sys.executable, ROOT / "train.py", config, "num_gpus=4"]
    status, out = ssh.run("n1", *script, f"save={calm}", f"load={calm}")
    assert status == 0, out
    undisturbed = list(curve(calm).values())
    # A step whose update was left out has no loss; an update is the same one wherever it comes.
    updates = [loss for _, loss in sorted(found.items()) if loss == loss]
    assert len(updates) >= STEPS - len(poisoned)
    assert updates == undisturbed[: len(updates)]
