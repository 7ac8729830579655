"""A damaged checkpoint is refused before anything is built from it, or passed over when asked."""

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING
from weight_sources import RandomWeights

from neox.checkpoint.huggingface import export_huggingface
from neox.checkpoint.native.manifest import Manifest
from neox.config import config_from_dict
from neox.errors import CheckpointError
from neox.training.preflight import prepare

FILE = "global_step4/optimizer-00001-001.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> dict[str, Any]:
    """A run of 6 steps, saved at 2, 4 and 6; its settings."""
    folder = tmp_path_factory.mktemp("saved")
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "save": str(folder), "checkpoint_factor": 2}
    flat |= {"model_parallel_size": 2, "train_iters": 6, "log_interval": 1, "padded_vocab_size": 131}
    run_ranks(train, 2, flat)
    return flat


def train(flat: dict[str, Any]) -> tuple[str, str]:
    """Train on this rank; what it raised, and what it wrote to stderr."""
    from neox.training.run import train

    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()) as written:
        try:
            train(config_from_dict(flat, world_size=2))
        except CheckpointError as error:
            return str(error), written.getvalue()
    return "", written.getvalue()


def damaged_copy(saved: dict[str, Any], root: Path) -> dict[str, Any]:
    """Settings that go on from a copy without the last checkpoint, and with one flipped bit in the one before."""
    shutil.copytree(saved["save"], root)
    shutil.rmtree(root / "global_step6")
    (root / "metrics.jsonl").unlink()
    (root / "latest").write_text("global_step4")
    content = bytearray((root / FILE).read_bytes())
    content[-5] ^= 32
    (root / FILE).write_bytes(content)
    return saved | {"save": str(root), "load": str(root)}


@pytest.mark.parametrize("changes", [{}, {"finetune": True}], ids=["resume", "finetune"])
def test_a_flipped_bit_is_refused_on_all_ranks(tmp_path: Path, saved: dict[str, Any], changes: dict[str, Any]) -> None:
    flat = damaged_copy(saved, tmp_path / "run") | changes
    if changes:  # a new run, for which there is no place in the folder of another
        flat["save"] = str(tmp_path / "tuned")
    prepare(config_from_dict(flat, world_size=2))  # which reads no tensors
    (first, _), (second, _) = run_ranks(train, 2, flat)
    assert first == second
    last = list(Manifest.parse(tmp_path / "run/global_step4").by_file()[FILE.partition("/")[2]])[-1]
    assert f"{FILE}: damaged, {last} is not what was written" in first
    assert "load_fallback: true" in first
    assert "\n" not in first


def test_the_one_before_is_loaded_when_asked(tmp_path: Path, saved: dict[str, Any]) -> None:
    flat = damaged_copy(saved, tmp_path / "run") | {"load_fallback": True}
    outcomes = run_ranks(train, 2, flat)
    assert [error for error, _ in outcomes] == ["", ""]
    warnings = [line for _, written in outcomes for line in written.splitlines() if "load_fallback" in line]
    assert len(warnings) == 1
    assert f"{FILE}: damaged" in warnings[0]
    assert warnings[0].endswith("load_fallback: loading " + str(tmp_path / "run/global_step2") + " instead")
    for path in Path(saved["save"]).glob("global_step6/*.safetensors"):
        assert path.read_bytes() == (tmp_path / "run/global_step6" / path.name).read_bytes()


def test_a_truncated_file_is_refused_before_any_worker_starts(tmp_path: Path, saved: dict[str, Any]) -> None:
    flat = damaged_copy(saved, tmp_path / "run")
    with (tmp_path / "run" / FILE).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=rf"{FILE}: has 1000 bytes, the manifest says \d+.*load_fallback: true"):
        prepare(config_from_dict(flat, world_size=2))
    prepare(config_from_dict(flat | {"load_fallback": True}, world_size=2))


def test_a_truncated_model_of_hugging_face_is_refused_before_any_worker_starts(tmp_path: Path, corpus: str) -> None:
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "train_iters": 1, "padded_vocab_size": 131}
    model, folder = config_from_dict(flat, world_size=1).model, tmp_path / "hf"
    export_huggingface(RandomWeights(model), model, folder, dtype=torch.float32)
    config = config_from_dict(flat | {"load": str(folder)}, world_size=1)
    prepare(config)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged, it has"):
        prepare(config)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        prepare(config)
