"""No run replaces or deletes what another has written: where it may start, and what it says of what is there."""

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.small_checkpoints import contents
from checkpoint.small_checkpoints import save as save_small
from golden_models import GOLDENS
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING

from neox.checkpoint.native.integrity import damages
from neox.checkpoint.native.manifest import Manifest, numbered_folders
from neox.config import Config, config_from_dict
from neox.errors import CheckpointError
from neox.training.origin import origin_of
from neox.training.preflight import prepare
from neox.training.save_folder import check_save, lineage_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> dict[str, Any]:
    """Settings of a run that has saved at 2 and 4, and goes on from there."""
    folder = str(tmp_path_factory.mktemp("lineage") / "run")
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "train_iters": 4, "checkpoint_factor": 2}
    flat |= {"model_parallel_size": 2, "save": folder, "load": folder}
    run_ranks(train, 2, flat)
    return flat


@pytest.fixture
def copy(run: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same with a folder of its own, and other steps."""
    shutil.copytree(run["save"], tmp_path / "run")
    return run | {"save": str(tmp_path / "run"), "load": str(tmp_path / "run"), "train_iters": 6} | OVERRIDE


OVERRIDE = {"override_lr_scheduler": True}


def train(flat: dict[str, Any]) -> str:
    """Train on this rank; what it wrote to stderr."""
    from neox.training.run import train

    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()) as written:
        train(prepare(config_from_dict(flat, world_size=int(os.environ["WORLD_SIZE"]))))
    return written.getvalue()


def config_of(flat: dict[str, Any], **changes: Any) -> Config:
    return config_from_dict(flat | changes, world_size=2)


def run_of(root: Path, iteration: int) -> tuple[str, list[str]]:
    manifest = Manifest.read(root / f"global_step{iteration}")
    return manifest.run, manifest.lineage


def said(config: Config) -> list[str]:
    origin = origin_of(config)
    return check_save(config, origin, lineage_of(config, origin))


@pytest.mark.parametrize(
    "changes",
    [{"load": None, "seed": 99}, {"finetune": True}, {"load": None, "latest": None}, {"load": "elsewhere"}],
    ids=["no load", "finetune", "no latest", "elsewhere"],
)
def test_a_run_that_begins_where_another_has_saved_is_refused(copy: dict[str, Any], changes: dict[str, Any]) -> None:
    """Before any worker starts, in one line; nothing there is touched."""
    root = Path(copy["save"])
    if "latest" in changes:
        (root / "latest").unlink()
    if changes.get("load"):
        shutil.copytree(root, root.with_name("elsewhere"))
        changes = {"load": str(root.with_name("elsewhere"))}
    before = contents(root)
    line = (
        f"save {root}: holds global_step2, global_step4, which this run does not resume from; "
        "name another folder or move them away, or set auto_resume: true to resume from the newest"
    )
    with pytest.raises(CheckpointError) as raised:
        prepare(config_of({key: value for key, value in (copy | changes).items() if key != "latest"}))
    assert str(raised.value) == line
    assert contents(root) == before
    prepare(config_of(copy, auto_resume=True, finetune=changes.get("finetune", False)))
    said_of = config_of(copy, do_train=False, load=None)
    assert said(said_of) == []


def test_a_lost_latest_is_no_fresh_start(copy: dict[str, Any]) -> None:
    """Refused by name; the newest is taken where that is asked for, and the run has not another name then."""
    root = Path(copy["save"])
    (root / "latest").unlink()
    lost = f"{root}: has global_step2, global_step4 and no latest; write the name of one into latest, or set iteration"
    with pytest.raises(CheckpointError) as raised:
        prepare(config_of(copy))
    assert str(raised.value) == f"{lost}; or set load_fallback: true to load the newest whole one"
    for asked in ({"iteration": 4}, {"load_fallback": True}):
        prepare(config_of(copy, **asked))
    (stderr, _) = run_ranks(train, 2, copy | {"auto_resume": True, "keep_last_n_checkpoints": 2, "async_save": True})
    assert f"resume {root / 'global_step4'}: iteration 4, 64 samples consumed" in stderr
    assert list(numbered_folders(root)) == [4, 6]
    assert damages(root / "global_step6") == []
    assert run_of(root, 6) == run_of(root, 4)


def test_a_branch_is_a_run_of_the_same_lineage(copy: dict[str, Any], tmp_path: Path) -> None:
    """Into a folder of its own; what it came from is not touched, nor what was in the way of nothing."""
    root, branch = Path(copy["save"]), tmp_path / "branch"
    parent, before = run_of(root, 4)[0], contents(root)
    branched = copy | {"save": str(branch), "keep_last_n_checkpoints": 1, "extra_save_iters": [5]}
    run_ranks(train, 2, branched)
    assert contents(root) == before
    (child, parents) = run_of(branch, 6)
    assert (len(child), parents) == (32, [parent])
    assert child != parent
    assert list(numbered_folders(branch)) == [6]
    config = config_of(copy, save=str(branch), load=str(branch))
    assert lineage_of(config, origin_of(config)).run == child
    config = config_of(copy, save=str(tmp_path / "third"), load=str(branch))
    assert lineage_of(config, origin_of(config)).parents == (parent, child)


def test_going_back_in_a_run_says_what_is_replaced(copy: dict[str, Any]) -> None:
    root = Path(copy["save"])
    assert said(config_of(copy)) == []
    line = f"save {root}: beyond iteration 2, replaced when the run reaches them: global_step4"
    assert said(config_of(copy, iteration=2)) == [line]
    (root / "global_step4" / "manifest.json").write_text("{")
    kept = f"save {root}: not written by this run, so they stay: global_step4"
    assert said(config_of(copy, load_fallback=True)) == [kept]
    run_name = run_of(root, 2)[0]
    first, second = run_ranks(train, 2, copy | {"load_fallback": True, "train_iters": 4, "keep_last_n_checkpoints": 1})
    assert kept in first
    assert kept not in second
    assert list(numbered_folders(root)) == [4]
    assert run_of(root, 4)[0] == run_name
    assert (root / "kept_global_step4" / "manifest.json").read_text() == "{"


def test_what_is_not_the_runs_stays_beside_it_unless_it_is_ahead(copy: dict[str, Any], tmp_path: Path) -> None:
    root = Path(copy["save"])
    save_small(tmp_path / "other", 1)
    shutil.move(tmp_path / "other" / "global_step1", root)
    shutil.copytree(GOLDENS / "seq" / "global_step4", root / "global_step3")
    kept = f"save {root}: not written by this run, so they stay: global_step1, global_step3"
    assert said(config_of(copy)) == [kept]
    with pytest.raises(CheckpointError) as raised:
        prepare(config_of(copy, iteration=2))
    assert str(raised.value) == (
        f"save {root}: holds global_step3, which this run did not write and would replace after iteration 2; "
        "name another folder, or move them away"
    )


def test_a_folder_of_gpt_neox_that_a_run_saves_to(tmp_path: Path) -> None:
    """It may go on there; what was there stays, and a later one of theirs is in its way."""
    for number in (4, 9):
        shutil.copytree(GOLDENS / "seq" / "global_step4", tmp_path / f"global_step{number}")
    (tmp_path / "latest").write_text("global_step4")
    golden = config_from_dict(read_golden() | {"save": str(tmp_path), "load": str(tmp_path)}, world_size=1)
    with pytest.raises(CheckpointError, match=r"holds global_step9, .* would replace after iteration 4;"):
        said(golden)
    shutil.rmtree(tmp_path / "global_step9")
    assert said(golden) == [f"save {tmp_path}: not written by this run, so they stay: global_step4"]
    lineage = lineage_of(golden, origin_of(golden))
    assert lineage.run
    assert lineage.parents == ()


def read_golden() -> dict[str, Any]:
    from golden_models import read_run

    config, _ = read_run("seq")
    return config.to_flat() | {"checkpoint_factor": 1, "no_load_optim": True}
