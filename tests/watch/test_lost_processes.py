"""A process of a real run dies, stops, sleeps or fails: the right one is named, and every other one ends."""

import re
from pathlib import Path

import pytest
from training.layouts import write_corpus
from watch.lost import (
    asleep,
    defective,
    killed,
    mistaken,
    reduce_until,
    run_until_all_end,
    stopped,
    train_until,
)

LONG = 600.0
"""Seconds after which a rank is lost, where something else must be noticed at once."""

SHORT = 5.0
"""More than a step takes on a busy machine."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text_document")


def paragraph(report: str, rank: int) -> str:
    """What a report says of the place of a rank."""
    for found in re.finditer(r"^  ranks? ([-,\d]+): (.*\n(?:    .*\n)*)", report, re.MULTILINE):
        bounds = [list(map(int, run.split("-"))) for run in found[1].split(",")]
        if any(bound[0] <= rank <= bound[-1] for bound in bounds):
            return found[2]
    raise AssertionError(f"nothing about rank {rank} in:\n{report}")


def test_a_killed_rank(tmp_path: Path, corpus: str) -> None:
    # Its data loader's process outlives it, and must not hold its connection.
    ended = run_until_all_end(train_until, killed, 2, corpus, LONG, 1, folder=tmp_path)
    assert ended.statuses == [3, 3, -9, 3]
    report = ended.texts[0]
    assert re.match(r"rank 2 \(host \S+, process \d+\) is gone: its process ended without a word", report)
    assert "last heard of at step" in paragraph(report, 2)
    for rank in (0, 1, 3):
        assert re.search(r"step 3.* all_reduce \(call \d+, \d+ elements, 2 ranks\)", paragraph(report, rank))
        assert "PlainEngine.train_step" in paragraph(report, rank)
    assert "Traceback" not in "".join(ended.texts)


def test_a_rank_that_waits_for_data(tmp_path: Path, corpus: str) -> None:
    ended = run_until_all_end(train_until, asleep, 3, corpus, SHORT, folder=tmp_path)
    assert ended.statuses == [3, 3, 3, 3]
    report = ended.texts[0]
    assert re.match(r"rank 3 \(host \S+, process \d+\) has not got on for \d", report)
    assert "step 3, outside of a collective" in paragraph(report, 3)
    assert "lost.py" in paragraph(report, 3)
    assert " asleep" in paragraph(report, 3)
    assert "BatchMaker.for_step" in paragraph(report, 3)
    for rank in (0, 1, 2):
        assert "step 3, in all_reduce (call " in paragraph(report, rank)


def test_a_stopped_rank(tmp_path: Path) -> None:
    ended = run_until_all_end(reduce_until, stopped, 1, SHORT, folder=tmp_path, stopped=1)
    assert ended.statuses == [3, None, 3, 3]
    assert re.match(r"rank 1 \(host \S+, process \d+\) (has not answered for|does not answer)", ended.texts[0])
    assert "step 5, in all_reduce (call 6, 8 elements, 4 ranks)" in paragraph(ended.texts[0], 3)


def test_the_first_rank_is_killed(tmp_path: Path) -> None:
    ended = run_until_all_end(reduce_until, killed, 0, LONG, folder=tmp_path)
    assert ended.statuses == [-9, 3, 3, 3]
    for rank in (1, 2, 3):
        assert re.match(rf"rank {rank} \(host \S+, process \d+\): rank 0 is gone: ", ended.texts[rank])
        assert re.search(r"stood at step [45], .* all_reduce \(call [56], 8 elements, 4 ranks\)", ended.texts[rank])
        assert ("reduce_until" in ended.texts[rank]) == (rank == 1)  # one stack of a host is enough


@pytest.mark.parametrize(("fault", "status"), [(defective, 1), (mistaken, 2)])
def test_a_rank_that_fails(tmp_path: Path, fault: object, status: int) -> None:
    ended = run_until_all_end(reduce_until, fault, 2, LONG, folder=tmp_path)
    others = 2 if status == 2 else 3  # a mistake would be met again: whoever watches the others must not start again
    assert ended.statuses == [others, others, status, others]
    reason = "ZeroDivisionError: a defect of this rank" if status == 1 else "DataError: corpus.bin: is damaged"
    assert re.match(rf"rank 2 \(host \S+, process \d+\) failed, and the others end with it: {reason}", ended.texts[0])
    assert ("Traceback" in ended.texts[2]) == (status == 1)
    assert "Traceback" not in ended.texts[0] + ended.texts[1] + ended.texts[3]


def test_all_ranks_fail_alike(tmp_path: Path) -> None:
    ended = run_until_all_end(reduce_until, mistaken, -1, LONG, folder=tmp_path)
    assert ended.statuses == [2, 2, 2, 2]
    assert ended.texts[0] == "corpus.bin: is damaged; copy it again\n"
