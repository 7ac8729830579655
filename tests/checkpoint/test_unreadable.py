"""Storage that does not give a checkpoint for a while, which is no damage of it."""

import errno
import os
from pathlib import Path

import pytest
from checkpoint.small_checkpoints import NAMES, save

from neox.checkpoint.native.fallback import Check, checkpoint_to_load
from neox.checkpoint.native.integrity import damages, team_damages
from neox.checkpoint.native.store import NativeReader, Team
from neox.checkpoint.storage import tensor_file
from neox.errors import UnreadError
from neox.patience import Patience

THOROUGH = Check(lambda folder: team_damages(folder, Team()))


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were slept, in no time."""
    slept: list[float] = []
    monkeypatch.setattr(tensor_file, "PATIENCE", Patience(10.0, sleep=slept.append, clock=lambda: sum(slept)))
    return slept


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Errors of the next reads of a part of a file."""
    errors: list[int] = []
    preadv = os.preadv

    def read(*arguments):
        if errors:
            raise OSError(errors[0], os.strerror(errors.pop(0)))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", read)
    return errors


def test_a_tensor_is_read_again(
    tmp_path: Path, slept: list[float], failing: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    reader = NativeReader(save(tmp_path, 1))
    expected = reader.tensor(NAMES[0])
    failing += [errno.EIO, errno.ESTALE]
    assert reader.tensor(NAMES[0]).equal(expected)
    assert slept == [1, 2]
    first, last = (record.getMessage() for record in caplog.records)
    assert f"({os.strerror(errno.EIO)}), trying again for 10 s" in first
    assert "can be read again by" in last


def test_what_cannot_be_read_is_no_damage_to_fall_back_from(
    tmp_path: Path, slept: list[float], failing: list[int]
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    failing += [errno.EIO] * 1000
    for look in (
        lambda: damages(newest),
        lambda: team_damages(newest, Team()),
        lambda: checkpoint_to_load(tmp_path, None, fallback=True, check=THOROUGH),
    ):
        with pytest.raises(
            UnreadError, match=rf"cannot be read by .* \({os.strerror(errno.EIO)}\), tried for 10 s"
        ) as caught:
            look()
        assert caught.value.exit_status == 1
    failing.clear()
    assert checkpoint_to_load(tmp_path, None, fallback=True, check=THOROUGH) == newest


def test_the_manifest_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 1)

    def refuse(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UnreadError, match=r"manifest\.json: cannot be read by .*Stale file handle"):
        NativeReader(folder)
