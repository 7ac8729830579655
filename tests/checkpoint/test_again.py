"""A checkpoint that storage refuses is written again, and the one before it stays whole."""

import errno
import os
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint.small_checkpoints import ALONE, RUN, save

import neox.checkpoint.native.store as native
from neox.checkpoint.native.again import write_patiently
from neox.checkpoint.native.integrity import damages
from neox.errors import CheckpointError, UnsavedError
from neox.patience import Patience

MODEL_FILE = "model-00000-000.safetensors"


class Disk:
    """A disk that recovers while a save waits; nobody really waits."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        self.while_waiting: list[Callable[[], object]] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.while_waiting:
            self.while_waiting.pop(0)()

    def save(self, root: Path, iteration: int, *, keep: int | None = None, numbers: int = 6) -> Path:
        return write_patiently(
            lambda: save(root, iteration, numbers=numbers),
            root,
            team=ALONE,
            patience=Patience(100.0, sleep=self.sleep, clock=lambda: self.now),
            keep=keep,
            lineage=RUN,
            tell=self.lines.append,
        )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_limit_of_the_system_that_is_lifted(tmp_path: Path) -> None:
    """A real error of a real write, for which no root is needed: no file may be longer than 10 kB."""
    disk, limits = Disk(), resource.getrlimit(resource.RLIMIT_FSIZE)
    disk.save(tmp_path, 1)
    seen: list[list[str]] = []
    disk.while_waiting += [
        lambda: seen.append(names(tmp_path)),
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    ]
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        folder = disk.save(tmp_path, 2, numbers=20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert seen == [["global_step1", "latest"]]  # nothing of the failed try is left while it waits
    assert damages(folder) == []
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert disk.now == 3.0
    first, last = disk.lines  # two tries, one line
    assert f"{MODEL_FILE}: cannot be written ({os.strerror(errno.EFBIG)}); the last checkpoint is untouched; " in first
    assert re.search(r"; [\d.]+ [GM]B are free, global_step1 takes 0\.0 MB; trying again for 100 s", first)
    assert last == f"{folder}: saved now"


class Full:
    """A disk that is full for so many writes of tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int, number: int = errno.ENOSPC) -> None:
        writer, self.times = native.TensorFileWriter, times

        def open_or_fail(path: Path, *arguments: Any) -> Any:
            if self.times:
                self.times -= 1
                raise OSError(number, os.strerror(number), str(path))
            return writer(path, *arguments)

        monkeypatch.setattr(native, "TensorFileWriter", open_or_fail)


def test_a_full_disk_is_given_room_by_what_would_go_anyway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    for iteration in (1, 2, 3):
        disk.save(tmp_path, iteration)
    Full(monkeypatch, 2)
    seen: list[list[str]] = []
    disk.while_waiting += [lambda: seen.append(names(tmp_path))] * 2
    disk.save(tmp_path, 4, keep=3)
    assert seen == [["global_step2", "global_step3", "latest"]] * 2
    assert names(tmp_path) == ["global_step2", "global_step3", "global_step4", "latest"]
    assert f"{tmp_path / 'global_step1'}: deleted to make room (keep_last_n_checkpoints: 3)" in disk.lines


def test_the_only_whole_checkpoint_makes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run was resumed from it, as the newest is damaged."""
    disk = Disk()
    disk.save(tmp_path, 1)
    os.truncate(disk.save(tmp_path, 2) / MODEL_FILE, 8)
    Full(monkeypatch, 1000)
    with pytest.raises(UnsavedError):
        disk.save(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["global_step1", "global_step2", "latest"]


@pytest.mark.parametrize(("keep", "number"), [(1, errno.ENOSPC), (None, errno.EDQUOT), (3, errno.EIO)])
def test_the_last_checkpoints_stay_where_it_does_not_recover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int | None, number: int
) -> None:
    disk = Disk()
    for iteration in (1, 2):
        disk.save(tmp_path, iteration)
    Full(monkeypatch, 1000, number)
    with pytest.raises(UnsavedError, match="the last checkpoint is untouched") as caught:
        disk.save(tmp_path, 3, keep=keep)
    assert caught.value.exit_status == 1
    assert disk.now == 100.0
    assert names(tmp_path) == ["global_step1", "global_step2", "latest"]
    assert damages(tmp_path / "global_step2") == []
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert len(disk.lines) == 1


@pytest.mark.parametrize("failing", ["begin", "write_whole", "commit"])
def test_every_part_of_a_save_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    disk, original, times = Disk(), getattr(native, failing), [1]
    disk.save(tmp_path, 1)

    def fail_once(*arguments: Any) -> Any:
        if failing == "write_whole":
            monkeypatch.setattr("neox.files.flush", original_flush if not times else refuse)
        elif times:
            refuse(arguments[0])
        return original(*arguments)

    def refuse(path: Path) -> None:
        times.clear()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    from neox.files import flush as original_flush

    monkeypatch.setattr(native, failing, fail_once)
    folder = disk.save(tmp_path, 2)
    assert damages(folder) == []
    assert disk.now == 1.0
    assert names(tmp_path) == ["global_step1", "global_step2", "latest"]
    assert "Read-only file system" in disk.lines[0]


def test_what_is_no_fault_of_storage_is_not_tried_again(tmp_path: Path) -> None:
    disk = Disk()

    def write() -> Path:
        raise CheckpointError("transformers computes something else")

    with pytest.raises(CheckpointError, match="something else"):
        write_patiently(
            write,
            tmp_path,
            team=ALONE,
            patience=Patience(9.0, sleep=disk.sleep),
            keep=None,
            lineage=RUN,
            tell=disk.lines.append,
        )
    assert (disk.now, disk.lines) == (0.0, [])


def test_old_checkpoints_that_cannot_be_deleted_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from neox.checkpoint.native.commit import prune_checkpoints

    for iteration in (1, 2, 3):
        save(tmp_path, iteration)

    def refuse(path: Path, target: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    assert prune_checkpoints(tmp_path, 1, RUN) == []
    assert "global_step1: old checkpoints cannot be deleted (Read-only file system)" in caplog.text


def test_a_latest_that_is_no_text_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says neither what may be deleted to make room, nor what a checkpoint takes."""
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    (tmp_path / "latest").write_bytes(b"\xff\0")
    disk = Disk()
    disk.while_waiting += [lambda: None] * 100

    def full() -> Path:
        raise UnsavedError("full", is_full=True)

    with pytest.raises(UnsavedError, match="full"):
        write_patiently(
            full,
            tmp_path,
            team=ALONE,
            patience=Patience(9.0, sleep=disk.sleep, clock=lambda: disk.now),
            keep=2,
            lineage=RUN,
            tell=disk.lines.append,
        )
    assert names(tmp_path) == ["global_step1", "global_step2", "global_step3", "latest"]
    assert "old checkpoints are not deleted" in caplog.text
