import json
import re
import shutil
import sysconfig
from pathlib import Path

import pytest

from neox.errors import LaunchError
from neox.quickstart.run import Run, run_quickstart

PACKAGES = ("asyncio", "email", "json", "logging", "urllib", "xml")  # a small part of the standard library
TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "compile": False,
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 4.0e-3, "betas": [0.9, 0.95]}},
    "train_iters": 30,
    "eval_interval": 15,
    "eval_iters": 2,
    "do_test": False,
    "log_interval": 5,
    "checkpoint_factor": 30,
}


def make_run(folder: Path, **changes: object) -> tuple[Run, Path]:
    library = folder / "library"
    for package in PACKAGES:
        source = Path(sysconfig.get_path("stdlib")) / package
        shutil.copytree(source, library / package, ignore=shutil.ignore_patterns("__pycache__"))
    config = folder / "tiny.yml"
    config.write_text(json.dumps(TINY | changes))
    return Run(folder / "run", config), library


def test_the_whole_path(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, library = make_run(tmp_path)
    loss = run_quickstart(run, vocab_size=512, library=library)
    printed = capfd.readouterr().out

    # Random weights need the 9 bits of a token of 512; 30 steps make it clearly less.
    assert loss.nats / loss.tokens < 5.7
    assert f"{loss.bits_per_byte:.4f} bits per byte" in printed
    metrics = [json.loads(line) for line in (run.out / "checkpoints" / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "validation/lm_loss" in m] == [15, 30]

    samples = [json.loads(line) for line in run.samples.read_text().splitlines()]
    assert [sample["context"] for sample in samples][:2] == ["def", "class"]
    assert all(sample["text"] for sample in samples)

    assert (run.export / "model.safetensors").is_file()
    difference = re.search(r"largest logit difference to transformers: (\S+)", printed)
    assert difference is not None
    assert float(difference[1]) < 1e-5
    assert "train_iters=60 override_lr_scheduler=true" in printed


def test_a_failing_step_stops_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, library = make_run(tmp_path, hidden_sise=64)
    with pytest.raises(LaunchError, match=r"train.py ended with status 2"):
        run_quickstart(run, vocab_size=512, library=library)
    assert "hidden_sise" in capfd.readouterr().err
    assert not run.samples.exists()
