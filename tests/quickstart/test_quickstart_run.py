import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts_of import fork_script

from neox.config import load_config
from neox.errors import ConfigError, LaunchError
from neox.quickstart import commands
from neox.quickstart.commands import run_script
from neox.quickstart.pace import affordable_steps
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


def fork_and_show(command: list[str], *, env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
    """In place of `subprocess.run`."""
    assert not check
    done = fork_script(command[1], *command[2:], **env)
    print(done.stdout, done.stderr)
    return done


def test_the_whole_path(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "subprocess", SimpleNamespace(run=fork_and_show))
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


def test_a_slow_machine_trains_fewer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = make_run(tmp_path)
    config = load_config([run.config], overrides=["padded_vocab_size=512"], world_size=1)
    assert affordable_steps(config, 0.0) == 3  # really timed
    monkeypatch.setattr("neox.quickstart.pace._seconds_per_step", lambda config: 0.5)
    assert affordable_steps(config, 11.01) == 20
    assert affordable_steps(config, 1000.0) == 30


def test_a_mistake_stops_it_before_training(tmp_path: Path) -> None:
    run, library = make_run(tmp_path, hidden_sise=64)
    with pytest.raises(ConfigError, match="hidden_sise"):
        run_quickstart(run, vocab_size=512, library=library)
    assert not run.samples.exists()


def test_a_failing_script_stops_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError, match=r"train.py ended with status 2"):
        run_script("train.py", "nowhere.yml")
    assert "nowhere.yml: no such file" in capfd.readouterr().err
