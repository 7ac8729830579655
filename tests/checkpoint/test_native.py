"""Native checkpoints on disk: committed whole, refused when damaged."""

import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint.small_checkpoints import RUN

from neox.checkpoint.native.commit import prune_checkpoints
from neox.checkpoint.native.manifest import Layout, Manifest, Progress, checkpoint_folder
from neox.checkpoint.native.store import AnnouncedTensor, NativeReader, StoredTensor, Team, write_checkpoint
from neox.checkpoint.weights import weight_source
from neox.errors import CheckpointError

NAME = "layers.2.mlp.linear1.bias"


def manifest(iteration: int) -> Manifest:
    return Manifest(
        progress=Progress(iteration=iteration, consumed_samples=8 * iteration),
        layout=Layout(1, 1, 1, 0),
        padded_vocab_size=131,
        precision="fp32",
        schedule={},
        optimizer="adam",
        config={},
        files={},
        tensors={},
        run=RUN.run,
    )


def save(root: Path, iteration: int, value: float = 1.0) -> Path:
    tensors = [
        StoredTensor("model", NAME, torch.full((4,), value)),
        StoredTensor("optimizer", f"{NAME}/exp_avg", torch.zeros(4)),
    ]
    return write_checkpoint(
        root,
        iteration=iteration,
        tensors=tensors,
        manifest=manifest(iteration),
        configs={"a/model.yml": "{}"},
        team=Team(),
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert checkpoint_folder(tmp_path) == folder == tmp_path / "global_step3"
    reader = NativeReader(folder)
    assert reader.names() == [NAME]
    assert reader.shapes() == {NAME: (4,)}
    assert torch.equal(weight_source(reader)(NAME, torch.Size([4])), torch.ones(4))
    assert reader.manifest.progress == Progress(iteration=3, consumed_samples=24)
    assert (folder / "configs" / "model.yml").read_text() == "{}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step3", "latest"]
    assert all(path.stat().st_mode & 0o044 for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "failing", ["store.TensorFileWriter", "store.write_whole", "commit.flush", "commit.write_whole"]
)
def test_a_failed_save_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(tmp_path, 1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(f"neox.checkpoint.native.{failing}", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".global_step*")), "what a failed save had written takes no space"
    folder = checkpoint_folder(tmp_path)
    assert folder == tmp_path / "global_step1"
    assert NAME in NativeReader(folder)
    assert save(tmp_path, 2) == checkpoint_folder(tmp_path)


def test_the_same_iteration_again(tmp_path: Path) -> None:
    save(tmp_path, 1, value=1.0)
    folder = save(tmp_path, 1, value=2.0)
    assert NativeReader(folder).tensor(NAME)[0] == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step1", "latest"]


def test_killed_between_the_renames_of_a_second_save(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    shutil.move(folder, tmp_path / ".global_step1.replaced")
    found = checkpoint_folder(tmp_path)
    assert found is not None
    assert NativeReader(found).tensor(NAME)[0] == 1.0
    save(tmp_path, 1, value=2.0)
    assert checkpoint_folder(tmp_path) == folder


def test_damage_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    file = folder / "model-00000-000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"model-00000-000\.safetensors: has \d+ bytes"):
        NativeReader(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        NativeReader(folder)
    file.write_bytes(os.urandom(len(content)))
    with pytest.raises(CheckpointError, match="damaged"):
        NativeReader(folder).tensor(NAME)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        NativeReader(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(CheckpointError, match="version"):
        NativeReader(folder)


def test_wrong_shape_and_absent_tensor(tmp_path: Path) -> None:
    reader = NativeReader(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"\[4\].*\[5\]"):
        weight_source(reader)(NAME, torch.Size([5]))
    with pytest.raises(CheckpointError, match="has no tensor"):
        reader.tensor("layers.9.x")


def test_pruning_keeps_the_newest_and_the_named(tmp_path: Path) -> None:
    for iteration in (1, 2, 10, 9):
        save(tmp_path, iteration)
    for iteration in (1, 2, 10):  # of one moment, as far as the file system knows
        os.utime(tmp_path / f"global_step{iteration}" / "manifest.json", (1e9, 1e9))
    prune_checkpoints(tmp_path, keep=2, lineage=RUN)
    assert sorted(p.name for p in tmp_path.glob("global_step*")) == ["global_step10", "global_step9"]
    (tmp_path / "latest").write_text("global_step10")
    prune_checkpoints(tmp_path, keep=1, lineage=RUN)
    assert sorted(p.name for p in tmp_path.glob("global_step*")) == ["global_step10", "global_step9"]


def test_pruning_leaves_alone_what_a_link_leads_to(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "run", tmp_path / "archive"
    save(root, 1)
    (root / "global_step1").rename(elsewhere)
    (root / "global_step1").symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    save(root, 2)
    prune_checkpoints(root, keep=1, lineage=RUN)
    assert before == sorted(elsewhere.rglob("*"))


def test_missing_checkpoints(tmp_path: Path) -> None:
    assert checkpoint_folder(tmp_path) is None
    save(tmp_path, 4)
    with pytest.raises(CheckpointError, match="global_step4"):
        checkpoint_folder(tmp_path, 5)


def test_announced_tensors_are_written_one_at_a_time(tmp_path: Path) -> None:
    keys = [f"layers.{index}.x" for index in range(6)]
    alive: list[weakref.ref[torch.Tensor]] = []

    def tensors() -> Iterator[StoredTensor]:
        for number, key in enumerate(keys):
            assert not any(reference() is not None for reference in alive), "the one before is still in memory"
            value = torch.full((5,), float(number))
            alive.append(weakref.ref(value))
            stored = StoredTensor("model", key, value)
            del value
            yield stored
            del stored

    folder = write_checkpoint(
        tmp_path,
        iteration=1,
        tensors=tensors(),
        manifest=manifest(1),
        configs={},
        team=Team(),
        file_bytes=40,
        announced=[AnnouncedTensor("model", key, torch.float32, torch.Size([5])) for key in keys],
    )
    reader = NativeReader(folder)
    assert sorted(reader.manifest.files) == [f"model-00000-00{number}.safetensors" for number in range(3)]
    assert [int(reader.tensor(key)[4]) for key in keys] == list(range(6))
