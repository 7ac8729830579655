"""Which run owns a checkpoint: what may take its name, what is deleted, and what is kept and named."""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint.small_checkpoints import ALONE, RUN, contents, manifest_of, save, stored
from golden_models import GOLDENS

from neox.checkpoint.native import commit
from neox.checkpoint.native.commit import prune_checkpoints
from neox.checkpoint.native.fallback import checkpoint_to_load
from neox.checkpoint.native.integrity import damages
from neox.checkpoint.native.lineage import Lineage, check_vacant
from neox.checkpoint.native.manifest import MANIFEST, Manifest, _checksum, checkpoint_folder, listed, numbered_folders
from neox.checkpoint.native.store import NativeReader, StoredTensor, Team, write_checkpoint
from neox.checkpoint.open import locate_checkpoint
from neox.errors import CheckpointError, UnsavedError

OTHER = Lineage("another-run")
CHILD = Lineage("a-child", (RUN.run,))


def without_run(folder: Path) -> Path:
    """Make the manifest what it was before runs had names."""
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    for key in ("run", "lineage", "checksum"):
        del content[key]
    (folder / MANIFEST).write_text(json.dumps({"checksum": _checksum(content)} | content))
    return folder


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_manifest_names_the_run_and_those_before_it(tmp_path: Path) -> None:
    found = Manifest.read(save(tmp_path, 1, lineage=CHILD))
    assert Lineage.of(found) == CHILD
    assert Lineage.begun().run != Lineage.begun().run
    assert re.fullmatch("[0-9a-f]{32}", Lineage.begun().run)


def test_a_checkpoint_of_before_runs_had_names_is_a_run_of_its_own(tmp_path: Path) -> None:
    first, second = (without_run(save(tmp_path, iteration)) for iteration in (1, 2))
    assert damages(first) == []
    assert NativeReader(first).manifest.progress.iteration == 1
    runs = [Manifest.read(folder).run for folder in (first, second)]
    assert runs[0] != runs[1]
    resumed = Lineage.of(Manifest.read(second))
    assert not resumed.parents
    assert (resumed.owns(first), resumed.owns(second)) == (False, True)
    assert not RUN.owns(second)


@pytest.mark.parametrize("other", ["another run", "GPT-NeoX", "an import", "before runs had names"])
def test_what_another_has_written_is_not_replaced(tmp_path: Path, other: str) -> None:
    save(tmp_path, 1)
    if other == "GPT-NeoX":
        shutil.copytree(GOLDENS / "seq" / "global_step4", tmp_path / "global_step4")
    elif other == "before runs had names":
        without_run(save(tmp_path, 4))
    else:
        save(tmp_path, 4, lineage=OTHER if other == "another run" else Lineage())
    before = contents(tmp_path)
    refused = re.escape(
        f"{tmp_path / 'global_step4'}: was not written by this run, which does not replace it; set save"
    )
    with pytest.raises(CheckpointError, match=f"^checkpoint cannot be written: {refused}[^\n]*$"):
        save(tmp_path, 4)
    assert contents(tmp_path) == before
    assert names(tmp_path) == ["global_step1", "global_step4", "latest"]


def test_a_checkpoint_of_another_run_that_came_while_this_one_wrote(tmp_path: Path) -> None:
    """Two runs in one folder, both begun when it was empty: whoever is first has the name."""

    def other_saves(folder: Path) -> None:
        shutil.copytree(save(tmp_path / "elsewhere", 4, lineage=OTHER), tmp_path / "run" / "global_step4")

    with pytest.raises(CheckpointError, match="global_step4: was not written by this run"):
        write_checkpoint(
            tmp_path / "run",
            iteration=4,
            tensors=stored(4),
            manifest=manifest_of(4),
            configs={},
            team=Team(),
            add=other_saves,
        )
    assert Manifest.read(tmp_path / "run" / "global_step4").run == OTHER.run
    assert names(tmp_path / "run") == ["global_step4"]


def test_own_checkpoints_and_those_of_the_line_are_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1)
    save(tmp_path, 1, lineage=CHILD)
    assert Manifest.read(tmp_path / "global_step1").run == CHILD.run
    (tmp_path / "global_step2").mkdir()
    assert damages(save(tmp_path, 2, lineage=CHILD)) == []
    with pytest.raises(CheckpointError, match="global_step1: was not written by this run"):
        save(tmp_path, 1)  # the parent does not know its child


@pytest.mark.parametrize("manifest", [None, "{"])
def test_what_no_longer_says_whose_it_is_is_moved_aside(
    tmp_path: Path, manifest: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    for again in ("", "_2"):
        path = save(tmp_path, 3) / MANIFEST
        path.unlink() if manifest is None else path.write_text(manifest)
        before = contents(tmp_path / "global_step3")
        with caplog.at_level(logging.WARNING):
            save(tmp_path, 3)
        assert damages(tmp_path / "global_step3") == []
        assert contents(tmp_path / f"kept_global_step3{again}") == before
        assert f"kept as kept_global_step3{again}" in caplog.text
    assert names(tmp_path) == ["global_step3", "kept_global_step3", "kept_global_step3_2", "latest"]
    assert list(numbered_folders(tmp_path)) == [3]


def test_pruning_deletes_what_the_run_has_written(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "seq" / "global_step4", tmp_path / "global_step4")
    save(tmp_path, 5, lineage=OTHER)
    save(tmp_path, 0, lineage=Lineage())
    without_run(save(tmp_path, 6))
    save(tmp_path, 7)
    (save(tmp_path, 8) / MANIFEST).write_text("{")
    for iteration in (9, 10, 11):
        save(tmp_path, iteration, lineage=CHILD)
    assert prune_checkpoints(tmp_path, 2, CHILD) == ["global_step7", "global_step9"]
    assert list(numbered_folders(tmp_path)) == [0, 4, 5, 6, 8, 10, 11]
    assert prune_checkpoints(tmp_path, 1, Lineage()) == []  # what is no run's deletes nothing


@pytest.mark.parametrize("state", ["lost", "empty", "a folder", "a link to nothing", "junk", "another"])
def test_checkpoints_without_a_latest_that_could_be_read(tmp_path: Path, state: str) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)
    latest = tmp_path / "latest"
    latest.unlink()
    match state:
        case "empty":
            latest.write_text("\n")
        case "a folder":
            latest.mkdir()
        case "a link to nothing":
            latest.symlink_to(tmp_path / "nothing")
        case "junk":
            latest.write_bytes(bytes(range(32)))
        case "another":
            latest.write_text("global_step7")
    two = "global_step5, global_step10"
    lost = f"{tmp_path}: has {two} and no latest; write the name of one into latest, or set iteration"
    expected = {
        "empty": f"{latest}: empty; {tmp_path} has: {two}; write the name of one into latest",
        "a folder": f"{latest}: a folder, not a file; replace it by a file with the name of a checkpoint",
        "junk": f"{latest}: damaged, it names no folder; write the name of a checkpoint into it",
        "another": f"{tmp_path / 'global_step7'}: no such checkpoint; {tmp_path} has: {two}",
    }.get(state, lost)
    for look in (checkpoint_folder, locate_checkpoint, lambda root: checkpoint_to_load(root, None, fallback=False)):
        with pytest.raises(CheckpointError, match=f"^{re.escape(expected)}[^\n]*$"):
            look(tmp_path)
    newest = tmp_path / ("global_step5" if state == "another" else "global_step10")
    assert checkpoint_to_load(tmp_path, None, fallback=True) == newest
    assert checkpoint_to_load(tmp_path, 5, fallback=False) == tmp_path / "global_step5"


def test_checkpoints_of_gpt_neox_without_latest(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "seq" / "global_step4", tmp_path / "global_step4")
    for fallback in (False, True):  # whether one is whole cannot be told without reading it
        with pytest.raises(CheckpointError, match="has global_step4 and no latest; write the name of one into latest"):
            checkpoint_to_load(tmp_path, None, fallback=fallback)


def test_two_starts_of_a_run_do_not_write_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = ["one", "other"]
    monkeypatch.setattr(commit, "_start", lambda: starts.pop(0))
    begun: list[Path] = []

    def tensors() -> Iterator[StoredTensor]:
        for number, tensor in enumerate(stored(3)):
            if number == 3:
                begun.append(commit.begin(tmp_path / "global_step3"))  # by the other start
            yield tensor

    with pytest.raises(UnsavedError, match="the last checkpoint is untouched"):
        write_checkpoint(
            tmp_path, iteration=3, tensors=tensors(), manifest=manifest_of(3), configs={}, team=ALONE, file_bytes=1
        )
    assert [path.name for path in tmp_path.iterdir()] == [begun[0].name]
    assert [path.name for path in begun[0].iterdir()] == ["configs"]


def test_nothing_that_was_saved_is_no_checkpoint_yet(tmp_path: Path) -> None:
    assert checkpoint_folder(tmp_path / "absent") is None
    (tmp_path / "global_step5").mkdir()
    (tmp_path / ".global_step6.incomplete" / "configs").mkdir(parents=True)
    (tmp_path / "global_step7").touch()
    assert checkpoint_folder(tmp_path) is None
    check_vacant(tmp_path)
    (tmp_path / ".global_step8.replaced").mkdir()
    (tmp_path / ".global_step8.replaced" / MANIFEST).touch()  # killed between two renames
    assert list(numbered_folders(tmp_path)) == [8]


def test_a_folder_with_checkpoints_is_not_vacant(tmp_path: Path) -> None:
    for iteration in range(5):
        save(tmp_path, iteration)
    listing = "global_step0, global_step1, global_step2 and 2 more"
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: holds checkpoints already \({listing}\); name another"):
        check_vacant(tmp_path)
    (tmp_path / "tagged").mkdir()
    (tmp_path / "tagged" / "best").mkdir()
    (tmp_path / "tagged" / "latest").write_text("best")  # DeepSpeed's names are free
    with pytest.raises(CheckpointError, match=r"\(best\)"):
        check_vacant(tmp_path / "tagged")
    assert listed([]) == "none"
