"""A data file that cannot be read is tried again, and named where that does not help."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_pipeline.golden_files import copy_corpus

from neox.data import BatchLoader, IndexedDataset
from neox.data.gpt_dataset import PackingOptions, build_gpt_dataset
from neox.errors import DataError, LostDataError
from neox.launch.main import script_main
from neox.patience import Patience


class Time:
    """A clock that moves when somebody sleeps, and does things then."""

    def __init__(self, at: dict[int, Callable[[], object]] | None = None) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.at = at or {}

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        self.at.get(len(self.slept), lambda: None)()

    def patience(self, seconds: float = 60.0) -> Patience:
        return Patience(seconds, sleep=self.sleep, clock=lambda: self.now)


@pytest.fixture
def failing_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of errors that the next reads give, one a read."""
    errors: list[int] = []
    for name in ("pread", "preadv"):
        original = getattr(os, name)

        def read(*arguments, original=original):
            if errors:
                number = errors.pop(0)
                raise OSError(number, os.strerror(number))
            return original(*arguments)

        monkeypatch.setattr(os, name, read)
    return errors


def test_a_read_error_that_passes(tmp_path: Path, failing_reads: list[int], caplog: pytest.LogCaptureFixture) -> None:
    time = Time()
    corpus = IndexedDataset(copy_corpus(tmp_path), patience=time.patience())
    expected = corpus[7]
    failing_reads += [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EIO]
    np.testing.assert_array_equal(corpus[7], expected)
    assert time.slept == [1, 2, 4, 8]
    first, last = (record.getMessage() for record in caplog.records)  # two lines, not one for each try
    assert "document.idx: cannot be read by " in first
    assert f"({os.strerror(errno.EIO)}), trying again for 60 s" in first
    assert "can be read again" in last
    assert "after 15 s" in last


def test_an_error_that_stays_ends_with_one_line(tmp_path: Path, failing_reads: list[int]) -> None:
    time = Time()
    corpus = IndexedDataset(copy_corpus(tmp_path), patience=time.patience(100))
    failing_reads += [errno.EIO] * 1000
    with pytest.raises(
        LostDataError, match=rf"\.idx: cannot be read by .*{os.strerror(errno.EIO)}.*tried for 100 s"
    ) as caught:
        corpus[7]
    assert "\n" not in str(caught.value)
    assert time.slept == [1, 2, 4, 8, 16, 30, 30, 9]

    def script(_: list[str]) -> None:
        raise caught.value

    assert script_main(script, []) == 1  # and not 2: no mistake that a launcher could not help


def test_an_error_at_the_start_is_tried_again_but_for_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time, failures = Time(), [errno.EIO] * 2
    original = os.open

    def open_file(path: Path, *arguments):
        if failures and Path(path).suffix == ".idx":
            raise OSError(failures.pop(), "from the test")
        return original(path, *arguments)

    prefix = copy_corpus(tmp_path)
    monkeypatch.setattr(os, "open", open_file)
    assert len(IndexedDataset(prefix, patience=time.patience())) == 100
    assert time.slept == [1, 2]
    failures += [errno.EACCES]
    with pytest.raises(DataError, match="cannot be read") as caught:
        IndexedDataset(prefix, patience=time.patience())
    assert caught.value.exit_status == 2
    assert time.slept == [1, 2]


def test_a_file_that_vanishes_and_comes_back(tmp_path: Path) -> None:
    prefix = copy_corpus(tmp_path)
    tokens, aside = Path(f"{prefix}.bin"), tmp_path / "aside"
    back = Time({2: lambda: aside.rename(tokens)})
    corpus = IndexedDataset(prefix, patience=back.patience())
    expected = corpus[7]
    tokens.rename(aside)
    np.testing.assert_array_equal(corpus[7], expected)  # as long as it is open it is there
    corpus._tokens.file.close()
    np.testing.assert_array_equal(corpus[7], expected)
    assert back.slept == [1, 2]


def test_a_file_put_back_by_somebody_else_in_real_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = copy_corpus(tmp_path)
    tokens, aside = Path(f"{prefix}.bin"), tmp_path / "aside"
    monkeypatch.setattr("neox.patience.FIRST_PAUSE", 0.01)
    waits = threading.Event()

    def sleep(seconds: float) -> None:
        waits.set()
        back.join(seconds)

    def put_back() -> None:
        waits.wait(240)
        aside.rename(tokens)

    corpus = IndexedDataset(prefix, patience=Patience(30.0, sleep=sleep))
    tokens.rename(aside)
    back = threading.Thread(target=put_back)
    back.start()
    assert len(corpus[7]) == corpus.sizes[7]
    back.join()


@pytest.mark.parametrize("bytes_left", [0, 100, 5000])
def test_a_file_of_another_size_is_not_read(tmp_path: Path, bytes_left: int) -> None:
    time = Time()
    prefix = copy_corpus(tmp_path)
    corpus = IndexedDataset(prefix, patience=time.patience(5))
    last = len(corpus) - 1
    corpus[last]
    os.truncate(f"{prefix}.bin", bytes_left)
    corpus._tokens.file.close()
    with pytest.raises(LostDataError, match=rf"it has {bytes_left} bytes, and had 3088"):
        corpus[last]


def test_a_file_cut_short_while_it_is_open_is_no_crash(tmp_path: Path) -> None:
    prefix = copy_corpus(tmp_path)
    whole = Path(f"{prefix}.bin").read_bytes()
    time = Time({3: lambda: Path(f"{prefix}.bin").write_bytes(whole)})
    corpus = IndexedDataset(prefix, patience=time.patience())
    expected = corpus[99]
    os.truncate(f"{prefix}.bin", 10)  # a memory map would end the process with SIGBUS here
    np.testing.assert_array_equal(corpus[99], expected)
    assert time.slept == [1, 2, 4]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_worker_passes_the_error_on_in_one_line(tmp_path: Path, num_workers: int) -> None:
    prefix = copy_corpus(tmp_path)
    tokens = IndexedDataset(prefix)
    packing = PackingOptions(seq_length=32, seed=1)
    dataset = build_gpt_dataset(tokens, packing, name="x", documents=range(100), num_samples=10)
    os.truncate(f"{prefix}.bin", 0)
    loader = BatchLoader(dataset, micro_batch_size=2, num_workers=num_workers)
    with pytest.raises(LostDataError, match=r"\.bin: cannot be read") as caught:
        next(loader)
    assert "\n" not in str(caught.value)


def test_the_order_of_samples_is_read_again_too(tmp_path: Path, failing_reads: list[int]) -> None:
    time = Time()
    tokens = IndexedDataset(copy_corpus(tmp_path), patience=time.patience())
    packing = PackingOptions(seq_length=32, seed=1)
    dataset = build_gpt_dataset(tokens, packing, name="x", documents=range(100), num_samples=10)
    expected = dataset[3]["tokens"]
    failing_reads += [errno.EIO]
    np.testing.assert_array_equal(dataset[3]["tokens"], expected)
    assert time.slept == [1]


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from neox.data import stored

    monkeypatch.setattr(stored, "_MOST_OPEN", 5)
    prefix = copy_corpus(tmp_path)
    many = [IndexedDataset(prefix) for _ in range(20)]
    before = len(os.listdir("/proc/self/fd"))
    lengths = [len(corpus[5]) for corpus in many]
    assert len(set(lengths)) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 6
