"""A run that was started again goes on from its own newest whole checkpoint, whatever it was started from at first."""

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import GOLDENS
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING
from training.test_resume import figures
from weight_sources import RandomWeights

from neox.checkpoint.huggingface import export_huggingface
from neox.checkpoint.load import read_loaded_model
from neox.config import Config, config_from_dict
from neox.errors import CheckpointError
from neox.training import resumption
from neox.training.origin import load_folder
from neox.training.preflight import prepare
from neox.training.resumption import BEGUN, agree_on_origin, going_on

STEPS = 8


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> dict[str, Any]:
    """Settings of a run that fine-tuned a folder of Hugging Face on two ranks, saved at every second step."""
    folder = tmp_path_factory.mktemp("tuned")
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "train_iters": STEPS, "log_interval": 1}
    flat |= {"checkpoint_factor": 2, "save": str(folder / "run"), "load": str(folder / "hf"), "finetune": True}
    model = config_from_dict(flat, world_size=1).model
    export_huggingface(RandomWeights(model), model, folder / "hf", dtype=torch.float32)
    run_ranks(train, 2, flat, {})
    return flat


def resolve(flat: dict[str, Any], world_size: int) -> Config:
    return config_from_dict(flat, world_size=world_size, read_model=read_loaded_model)


def train(flat: dict[str, Any], counts: dict[int, str]) -> str:
    """What train.py does on this rank, whose launcher tells it one of `counts`; what it writes to stderr."""
    from neox.training.run import train

    torch.set_num_threads(1)
    os.environ["TORCHELASTIC_RESTART_COUNT"] = counts.get(int(os.environ["RANK"]), "0")
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = "3" if counts else "0"
    with contextlib.redirect_stderr(io.StringIO()) as written:
        train(prepare(resolve(flat, int(os.environ["WORLD_SIZE"]))))
    return written.getvalue()


def refusal(flat: dict[str, Any], counts: dict[int, str]) -> str:
    """Why `train` does not start."""
    with pytest.raises(CheckpointError) as raised:
        train(flat, counts)
    return str(raised.value)


def interrupted(tuned: dict[str, Any], root: Path) -> dict[str, Any]:
    """Settings of the same run with a copy of its folder as it was after step 6, whose checkpoint is damaged."""
    shutil.copytree(tuned["save"], root)
    shutil.rmtree(root / f"global_step{STEPS}")
    (root / "metrics.jsonl").unlink()
    (root / "latest").write_text("global_step6")
    with next((root / "global_step6").glob("optimizer-*")).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        last = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([last[0] ^ 32]))
    return tuned | {"save": str(root)}


def test_a_restart_that_one_host_knows_of(tmp_path: Path, tuned: dict[str, Any]) -> None:
    """From step 4, as 6 is damaged, bit for bit; not again from the folder that `load` names."""
    flat = interrupted(tuned, tmp_path / "run")
    first, second = run_ranks(train, 2, flat, {1: "1"})
    assert "load_fallback: loading " + str(tmp_path / "run/global_step4") + " instead" in first
    assert f"resume {tmp_path / 'run/global_step4'}: iteration 4, 64 samples consumed" in first
    assert "differs" not in first
    assert "resume" not in second
    for path in Path(tuned["save"]).glob(f"global_step{STEPS}/*.safetensors"):
        assert path.read_bytes() == (tmp_path / "run" / path.parent.name / path.name).read_bytes()


def test_fewer_ranks_go_on_with_the_same_batch(tmp_path: Path, tuned: dict[str, Any]) -> None:
    flat = interrupted(tuned, tmp_path / "run") | {"elastic": True, "train_micro_batch_size_per_gpu": 8}
    (said,) = run_ranks(train, 1, flat, {0: "1"})
    assert "layout: pipeline 1 x data 2 x tensor 1, ZeRO 0 -> pipeline 1 x data 1 x tensor 1, ZeRO 0" in said
    assert resolve(flat, 1).batch.gradient_accumulation_steps == 2
    undisturbed, found = figures(Path(tuned["save"])), figures(tmp_path / "run")
    losses = {step: value for (step, name), value in found.items() if name == "train/lm_loss"}
    assert list(losses) == [5, 6, 7, 8]
    for step, value in losses.items():
        assert value == pytest.approx(undisturbed[step, "train/lm_loss"], abs=1e-5)


def test_the_batch_of_the_checkpoint_is_kept(tmp_path: Path, tuned: dict[str, Any]) -> None:
    unset = {"train_batch_size": None, "finetune": False, "elastic": True, "load": tuned["save"]}
    for processes, steps in ((1, 2), (2, 1), (4, 1)):
        batch = resolve(tuned | unset, processes).batch
        assert (batch.train_batch_size, batch.gradient_accumulation_steps) == (16, steps)
        assert batch.train_micro_batch_size_per_gpu == min(8, 16 // processes)


def test_when_a_run_goes_on_from_save(tmp_path: Path, tuned: dict[str, Any]) -> None:
    def loads(restarted: bool, **keys: Any) -> str | None:
        return going_on(resolve(tuned | keys, 1), restarted=restarted).checkpoint.load

    assert loads(restarted=False) == tuned["load"]
    assert loads(restarted=True) == tuned["save"]
    assert loads(restarted=False, auto_resume=True) == tuned["save"]
    assert loads(restarted=True, auto_resume=False) == tuned["load"]
    assert loads(restarted=True, save=str(tmp_path / "empty")) == tuned["load"]
    assert loads(restarted=True, save=None, checkpoint_factor=None) == tuned["load"]


def test_checkpoints_of_another_run_in_the_same_folder(tmp_path: Path, tuned: dict[str, Any]) -> None:
    """A run is not started beside them, also not by a launcher that starts again what it has seen fail."""
    flat = interrupted(tuned, tmp_path / "run") | {"train_iters": 1, "checkpoint_factor": 100}
    before = contents(tmp_path / "run")
    refused = (
        f"save {tmp_path / 'run'}: holds global_step2, global_step4, global_step6, which this run does not resume "
        "from; name another folder or move them away, or set auto_resume: true to resume from the newest"
    )
    assert run_ranks(refusal, 1, flat, {}) == [refused]
    assert not (tmp_path / "run" / BEGUN).exists()
    assert run_ranks(refusal, 2, flat, {0: "0"}) == [refused, refused]  # where the ranks have met
    assert (tmp_path / "run" / BEGUN).is_file()
    (tmp_path / "run" / "latest").rename(tmp_path / "lost")
    assert run_ranks(refusal, 2, flat, {0: "1"}) == [refused, refused]
    (tmp_path / "lost").rename(tmp_path / "run" / "latest")
    assert contents(tmp_path / "run") == before
    begun = resolve(flat, 1)
    (tmp_path / "run" / "latest").write_text("global_step4")
    assert going_on(begun, restarted=True) is begun
    shutil.copytree(GOLDENS / "seq" / "global_step4", tmp_path / "run" / "global_step9")  # of GPT-NeoX
    (tmp_path / "run" / "latest").write_text("global_step9")
    assert going_on(begun, restarted=True) is begun
    (tmp_path / "run" / "latest").write_text("global_step4")
    os.utime(tmp_path / "run/global_step4/manifest.json")  # as if it had begun beside them and saved
    assert load_folder(going_on(begun, restarted=True)) == tmp_path / "run/global_step4"


def contents(root: Path) -> dict[str, bytes]:
    """Every byte of the checkpoints in a folder."""
    files = (path for path in [root / "latest", *root.glob("global_step*/**/*")] if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def views(flat: dict[str, Any], late_looks: int) -> str:
    """What becomes of it that this rank, unless it is the first, looks so often before it sees what the first does."""
    from neox.parallel.mesh import build_mesh

    resumption._SECONDS_TO_AGREE, resumption._POLL_SECONDS = (60.0 if late_looks < 10 else 1.0), 0.1
    config = resolve(flat, 2)
    mesh, looks = build_mesh(config), 0

    def look(config: Config) -> Path | None:
        nonlocal looks
        looks += 1
        return Path("elsewhere") if mesh.rank and looks <= late_looks else load_folder(config)

    resumption.load_folder = look  # type: ignore[attr-defined]
    try:
        return str(load_folder(agree_on_origin(config, mesh)))
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("late_looks", [3, 10**9])
def test_hosts_that_see_another_checkpoint(tuned: dict[str, Any], late_looks: int) -> None:
    first, second = run_ranks(views, 2, tuned, late_looks)
    assert first == second
    if late_looks == 3:
        assert first == tuned["load"]
    else:
        assert first.startswith(f"save {tuned['save']}: hosts do not see the same checkpoint: ")
        assert "sees elsewhere" in first
