import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from corpus import documents
from scripts_of import fork_script

from neox.config import load_config
from neox.errors import ConfigError, LaunchError
from neox.quickstart import commands
from neox.quickstart.commands import run_script
from neox.quickstart.pace import affordable_steps
from neox.quickstart.run import Run, run_quickstart

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
    library.mkdir()
    for number, text in enumerate(documents()):
        (library / f"module{number}.py").write_text(text)
    config = folder / "tiny.yml"
    config.write_text(json.dumps(TINY | changes))
    return Run(folder / "run", config), library


def fork_and_show(
    command: list[str], *, env: dict[str, str], stdout: int | None, check: bool
) -> subprocess.CompletedProcess[str]:
    """In place of `subprocess.run`."""
    assert stdout is None  # where the test's own goes
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


def test_the_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    run, library = make_run(tmp_path, hidden_sise=64)
    run.out.mkdir()
    (run.out / "train.jsonl").write_text("mine\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"^--out .*run: exists already and was not made by a quickstart; "):
            run_quickstart(run, vocab_size=512, library=library)
    assert [path.name for path in run.out.iterdir()] == ["train.jsonl"]
    assert (run.out / "train.jsonl").read_text() == "mine\n"
    (run.out / "train.jsonl").unlink()
    for _ in range(2):  # a folder of its own is used again
        with pytest.raises(ConfigError, match="hidden_sise"):
            run_quickstart(run, vocab_size=512, library=library)


def test_a_failing_script_stops_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError, match=r"train.py ended with status 2"):
        run_script("train.py", "nowhere.yml")
    assert "nowhere.yml: no such file" in capfd.readouterr().err
