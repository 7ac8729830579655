"""Sample orders on disk: reused while the corpus is the same, rebuilt when not, written by one process."""

import threading
from pathlib import Path

import numpy as np
import pytest

from neox.data.index_cache import Coordinator, cached_maps
from neox.data.packing import IndexMaps, packed_maps

SIZES = np.full(50, 9, np.int32)


class Builder:
    """Counts how often the maps are computed."""

    def __init__(self, seed: int = 1) -> None:
        self.calls = 0
        self.seed = seed

    def __call__(self) -> IndexMaps:
        self.calls += 1
        return packed_maps(SIZES, np.arange(50), seq_length=8, num_epochs=1, seed=self.seed)


def test_a_second_call_reads_the_files(tmp_path: Path) -> None:
    first, second = Builder(), Builder(seed=2)
    maps = cached_maps(f"{tmp_path}/x", {"layout": "a"}, first)
    again = cached_maps(f"{tmp_path}/x", {"layout": "a"}, second)
    assert (first.calls, second.calls) == (1, 0)
    for one, other in zip(maps, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_maps_of_another_split_are_not_replaced_while_a_run_reads_them(tmp_path: Path) -> None:
    maps = cached_maps(f"{tmp_path}/x", {"documents": [0, 50]}, Builder(seed=2))
    other = cached_maps(f"{tmp_path}/x", {"documents": [0, 40]}, Builder(seed=3))
    np.testing.assert_array_equal(maps.shuffle_idx, Builder(seed=2)().shuffle_idx)
    np.testing.assert_array_equal(other.shuffle_idx, Builder(seed=3)().shuffle_idx)
    again = Builder()
    for documents, found in (([0, 50], maps), ([0, 40], other)):
        read = cached_maps(f"{tmp_path}/x", {"documents": documents}, again)
        np.testing.assert_array_equal(read.shuffle_idx, found.shuffle_idx)
    assert again.calls == 0


@pytest.mark.parametrize("spoil", ["missing", "truncated", "deep"])
def test_damaged_files_are_rebuilt(spoil: str, tmp_path: Path) -> None:
    cached_maps(f"{tmp_path}/x", {}, Builder(seed=2))
    file = tmp_path / "x_shuffle_idx.npy"
    if spoil == "missing":
        (tmp_path / "x_fingerprint.json").unlink()  # upstream's files have none: they are not trusted either
    if spoil == "deep":
        (tmp_path / "x_fingerprint.json").write_text("[" * 100_000)
    if spoil == "truncated":
        file.write_bytes(file.read_bytes()[:150])
    builder = Builder()
    maps = cached_maps(f"{tmp_path}/x", {}, builder)
    assert builder.calls == 1
    np.testing.assert_array_equal(maps.shuffle_idx, Builder()().shuffle_idx)
    np.testing.assert_array_equal(np.load(file), maps.shuffle_idx)


def test_one_process_builds_while_the_others_wait(tmp_path: Path) -> None:
    barrier, builders, results = threading.Barrier(4), [Builder() for _ in range(4)], {}

    def start(rank: int) -> None:
        coordinator = Coordinator(global_rank=rank, local_rank=rank % 2, barrier=lambda: void(barrier.wait(120)))
        results[rank] = cached_maps(f"{tmp_path}/x", {}, builders[rank], coordinator=coordinator)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [builder.calls for builder in builders] == [1, 0, 0, 0]
    assert all(np.array_equal(results[rank].doc_idx, results[0].doc_idx) for rank in range(4))


def void(_: object) -> None:
    """Drop a result."""


def test_the_builder_of_each_machine() -> None:
    second_machine = Coordinator(global_rank=8, local_rank=0)
    assert not second_machine.is_builder(use_shared_fs=True)
    assert second_machine.is_builder(use_shared_fs=False)


def test_a_failing_builder_still_reaches_the_barrier(tmp_path: Path) -> None:
    reached = []

    def fail() -> IndexMaps:
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        cached_maps(f"{tmp_path}/x", {}, fail, coordinator=Coordinator(barrier=lambda: reached.append(1)))
    assert reached == [1]


def test_an_unwritable_folder_falls_back_to_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"  # a path below a plain file can be written by nobody, root included
    blocked.write_text("")
    builder = Builder()
    maps = cached_maps(str(blocked / "x"), {}, builder)
    assert builder.calls == 1
    assert "stays in memory" in caplog.text
    np.testing.assert_array_equal(maps.doc_idx, Builder()().doc_idx)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
