"""train.py as users call it: real processes, real launchers, real mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import free_port
from scripts_of import fork_script
from training.layouts import ADAMW, MODEL, TRAINING, write_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus_text_document")


def settings(corpus: str, save: Path, **changes: Any) -> dict[str, Any]:
    run = {"data_path": corpus, "save": str(save), "checkpoint_factor": 2, "train_iters": 2, "log_interval": 1}
    return MODEL | TRAINING | ADAMW | run | changes


def write_config(folder: Path, flat: dict[str, Any], name: str = "model.yml") -> Path:
    path = folder / name
    path.write_text(json.dumps(flat, indent=1))
    return path


def run(command: list[str], *, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=240, check=False)


def train(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return fork_script("train.py", *arguments, **environ)


def losses(save: Path) -> list[float]:
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [record["train/lm_loss"] for record in records if "train/lm_loss" in record]


def test_upstreams_spelling_and_overrides(tmp_path: Path, corpus: str) -> None:
    write_config(tmp_path, settings(corpus, tmp_path / "unused", train_iters=50), "model.yml")
    done = train("-d", tmp_path, "model", f"save={tmp_path / 'run'}", "train_iters=3", "optimizer.params.lr=1e-4")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "latest").read_text() == "global_step3"
    manifest = json.loads((tmp_path / "run" / "global_step3" / "manifest.json").read_text())
    assert manifest["schedule"]["start_lr"] == 1e-4
    assert (tmp_path / "run" / "global_step3" / "configs" / "model.yml").is_file()


def test_starts_its_own_workers_which_have_the_losses_of_one(tmp_path: Path, corpus: str) -> None:
    config = write_config(tmp_path, settings(corpus, tmp_path / "one", gradient_accumulation_steps=2))
    assert train(config).returncode == 0
    done = train(config, f"save={tmp_path / 'two'}", "pipe_parallel_size=2")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "two" / "global_step2" / "manifest.json").read_text())
    assert manifest["layout"] == {
        "pipe_parallel_size": 2,
        "data_parallel_size": 1,
        "model_parallel_size": 1,
        "zero_stage": 1,
    }
    # said once, in one line
    assert done.stderr.count("runs as stage 1") == 1
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=2e-5)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_joins_under_a_launcher(tmp_path: Path, corpus: str, launcher: str) -> None:
    config = write_config(tmp_path, settings(corpus, tmp_path / "run"))
    port = str(free_port())
    folder = Path(sys.executable).parent
    if launcher == "torchrun":
        start = [str(folder / "torchrun"), "--nproc-per-node", "2", "--master-port", port]
    else:
        start = [str(folder / "deepspeed"), "--num_gpus", "2", "--master_port", port]
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    done = run([*start, str(ROOT / "train.py"), str(config)], DS_ACCELERATOR="cpu", PATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((tmp_path / "run" / "global_step2" / "manifest.json").read_text())
    assert manifest["layout"]["data_parallel_size"] == 2


PDSH = """#!/bin/bash
# A stand-in for `pdsh -S -f N -w HOST COMMAND...`: the host is this machine, and the first, as %n is to say.
while [ "$1" != -w ]; do shift; done
shift 2
exec sh -c "${*//%n/0}"
"""


@pytest.mark.slow  # `make test-cluster` does it with pdsh itself
def test_a_hostfile_hands_over_to_the_deepspeed_launcher(tmp_path: Path, corpus: str) -> None:
    pdsh = tmp_path / "bin" / "pdsh"
    pdsh.parent.mkdir()
    pdsh.write_text(PDSH)
    pdsh.chmod(0o755)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\n")
    config = write_config(
        tmp_path,
        settings(corpus, tmp_path / "run", master_port=free_port(), no_ssh_check=True, master_addr="127.0.0.1"),
    )
    path = f"{pdsh.parent}{os.pathsep}{os.environ['PATH']}"
    done = train(config, "-H", hostfile, DS_ACCELERATOR="cpu", PATH=path)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((tmp_path / "run" / "global_step2" / "manifest.json").read_text())
    assert manifest["layout"]["data_parallel_size"] == 2


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bad key": ({"hiden_size": 64}, ["hiden_size", "hidden_size"]),
    "save_interval": ({"save_interval": 10}, ["save_interval", "checkpoint_factor"]),
    "missing data": ({"data_path": "/nowhere/corpus_text_document"}, ["/nowhere/corpus_text_document"]),
    "batch does not divide": (
        {"train_batch_size": 15, "train_micro_batch_size_per_gpu": 4},
        ["train_batch_size", "15"],
    ),
    "heads": ({"model_parallel_size": 8}, ["num_attention_heads", "model_parallel_size"]),
    "zero 3 in a pipeline": (
        {"pipe_parallel_size": 2, "zero_optimization": {"stage": 3}},
        ["stage", "pipe_parallel_size"],
    ),
    "not yet": ({"rpe_num_buckets": 8}, ["rpe_num_buckets", "not supported yet"]),
    "missing tokenizer": (
        {"padded_vocab_size": None, "tokenizer_type": "HFTokenizer", "vocab_file": "/nowhere/tokenizer.json"},
        ["/nowhere/tokenizer.json"],
    ),
    "missing weights": ({"load": "/nowhere/weights", "finetune": True}, ["/nowhere/weights"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, corpus: str, mistake: str) -> None:
    changes, words = MISTAKES[mistake]
    config = write_config(tmp_path, settings(corpus, tmp_path / "run", **changes))
    assert_refused(train(config), words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mistake", ["bad key", "missing data"])
def test_a_mistake_is_one_line_with_what_imports_print(tmp_path: Path, corpus: str, mistake: str) -> None:
    changes, words = MISTAKES[mistake]
    config = write_config(tmp_path, settings(corpus, tmp_path / "run", **changes))
    # DeepSpeed looks for no accelerator then, and says nothing of having found none.
    assert_refused(run([sys.executable, str(ROOT / "train.py"), str(config)], DS_ACCELERATOR="cpu"), words)


def test_a_checkpoint_of_another_shape(tmp_path: Path, corpus: str) -> None:
    config = write_config(tmp_path, settings(corpus, tmp_path / "run"))
    assert train(config).returncode == 0
    load = f"load={tmp_path / 'run'}"
    done = train(config, load, "hidden_size=128", "model_parallel_size=2")
    assert_refused(done, ["command line: hidden_size: 128", "manifest.json has, 64"])
    assert_refused(train(config, load, "num_layers=3"), ["command line: num_layers: 3", "manifest.json has, 2"])
    (tmp_path / "run" / "global_step2" / "model-00000-000.safetensors").write_bytes(b"short")
    assert_refused(train(config, load), ["model-00000-000.safetensors", "bytes"])


def assert_refused(done: subprocess.CompletedProcess[str], words: list[str]) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


def test_a_torn_hugging_face_folder(tmp_path: Path, corpus: str) -> None:
    """Pointing `load` at a model that cannot be read must not start from scratch without a word."""
    model = tmp_path / "hf"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    config = write_config(tmp_path, settings(corpus, tmp_path / "run", load=str(model)))
    assert_refused(train(config), ["config.json", "vocab_size", "copy it again"])


def test_starting_from_scratch_is_said(tmp_path: Path, corpus: str) -> None:
    config = write_config(tmp_path, settings(corpus, tmp_path / "run", load=str(tmp_path / "run")))
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert "starting from fresh weights" in done.stderr
    assert "starting from fresh weights" not in train(config, "train_iters=2").stderr


def test_a_run_by_epochs_goes_on(tmp_path: Path, corpus: str) -> None:
    """The schedule's horizon comes from the data then, also when the checkpoint is compared with it."""
    flat = settings(corpus, tmp_path / "run", train_epochs=1, train_batch_size=1024, load=str(tmp_path / "run"))
    config = write_config(tmp_path, {key: value for key, value in flat.items() if key != "train_iters"})
    assert train(config, "exit_interval=1").returncode == 0
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) >= 2
