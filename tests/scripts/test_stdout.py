"""What each tool that prints data leaves on standard output, while a library prints with every file that is opened."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference.small_model import SMALL, save_small
from scripts_of import ROOT, fork_script

from neox.data.indexed_writer import IndexedDatasetWriter

NOISY = """
import os, runpy, sys
from neox import results

def noise(event, arguments):
    if event == "open" and results.descriptor() is not None:
        os.write(1, b"noise\\n")
        print("noise")

sys.addaudithook(noise)
sys.argv = sys.argv[1:]
if sys.argv[0].endswith(".py"):
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
DOCUMENT = {"text": "a plain text", "chat": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its checkpoint, text and tokens."""
    folder = tmp_path_factory.mktemp("stdout")
    (folder / "noisy.py").write_text(NOISY)
    (folder / "model.yml").write_text(json.dumps(SMALL | {"load": str(save_small(folder / "run"))}))
    (folder / "text.jsonl").write_text(json.dumps(DOCUMENT) + "\n")
    with IndexedDatasetWriter(str(folder / "corpus"), np.dtype(np.uint16)) as writer:
        for _ in range(8):
            writer.add_document(np.arange(300, dtype=np.uint16))
    np.save(folder / "ids.npy", np.zeros((2, 8), dtype=np.int64))
    return folder


def run(folder: Path, name: str, *words: Any, status: int = 0) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / name) if name.endswith(".py") else name
    done = fork_script(str(folder / "noisy.py"), script, *words, cwd=folder)
    assert done.returncode == status, done.stderr
    assert "noise" in done.stderr  # the script has claimed standard output
    return done


JSON: dict[str, tuple[tuple[str, ...], Callable[[Any], Any], Any]] = {
    "tools/count_parameters.py": (("model.yml", "--json"), lambda found: found["padded_vocab_size"], 512),
    "tools/ckpts/inspect_checkpoint.py": (("run", "--json"), lambda found: found["checkpoint"]["format"], "native"),
    "neox.config": (("show", "model.yml", "--json"), lambda found: found["num_layers"]["value"], 3),
}


@pytest.mark.parametrize("name", JSON)
def test_json_parses_whole(folder: Path, name: str) -> None:
    words, read, value = JSON[name]
    assert read(json.loads(run(folder, name, *words).stdout)) == value


TRAIN = "optimizer.type=Adam", "optimizer.params.lr=1e-3", "train_iters=2", "data_path=corpus", "log_interval=1"
PREPROCESS = "--input", "text.jsonl", "--output-prefix"
LINES: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "tools/ckpts/verify_checkpoint.py": (("run",), ["run/global_step7: whole"]),
    "tools/ckpts/logits.py": (
        ("run", "--tokens", "ids.npy", "--out", "logits.npy"),
        ["logits.npy: logits [2, 8, 512] in fp32, 32,768 bytes, of run/global_step7"],
    ),
    "tools/datasets/preprocess_data.py": (
        (*PREPROCESS, "data", "--tokenizer-type", "CharLevelTokenizer"),
        ["data_text_document.bin: 1 documents, 12 tokens"],
    ),
    "neox.config": (("check", "model.yml"), ["valid: model.yml"]),
    "neox.launch": (
        ("kubernetes", "model.yml", *TRAIN, "--nodes", "1", "--image", "x", "--max-restarts", "0", "-o", "job.yaml"),
        ["job.yaml"],
    ),
    "generate.py": (("model.yml", "-m", "2", "-o", "samples.jsonl"), ["1 sample written to samples.jsonl"]),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_of_results_alone(folder: Path, name: str) -> None:
    words, lines = LINES[name]
    assert run(folder, name, *words).stdout.splitlines() == lines


def test_training_prints_its_figures_alone(folder: Path) -> None:
    done = run(
        folder, "train.py", "model.yml", *TRAIN, "load=null", "eval_iters=0", "num_workers=1", "hidden_dropout=0"
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("iteration" in line and "lm_loss: " in line for line in lines)
