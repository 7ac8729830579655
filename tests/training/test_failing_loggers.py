"""Places for metrics that fail while a run is going on: said once, tried again, no reason to end."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from neox import results
from neox.training.logs.files import AppendedFile
from neox.training.metrics import loggers
from neox.training.metrics.json_lines import JsonLinesSink
from neox.training.metrics.loggers import LineSink, MetricLog, TensorBoardSink


def test_lines_that_a_full_disk_refused_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricLog([JsonLinesSink(path)])
    metrics.log(1, {"x": 1.0})
    write, full = os.write, True

    def fail_halfway(descriptor: int, data: Any) -> int:
        if full and len(data) < 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:-5] if full else data)

    monkeypatch.setattr(os, "write", fail_halfway)
    metrics.log(2, {"x": 2.0})
    metrics.log(3, {"x": 3.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]  # no half a line either
    full = False
    metrics.log(4, {"x": 4.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "JsonLinesSink fails ([Errno 28] No space left on device); training goes on, and it is tried again",
        "JsonLinesSink works again",
    ]


def test_lines_that_wait_are_written_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    metrics = MetricLog([JsonLinesSink(folder / "metrics.jsonl")])
    folder.rename(tmp_path / "away")
    metrics.log(1, {"x": 1.0})
    folder.mkdir()
    metrics.close()
    assert json.loads((folder / "metrics.jsonl").read_text())["step"] == 1


class Writer:
    """TensorBoard's, which fails for ever once its thread has died."""

    made: ClassVar[list["Writer"]] = []

    def __init__(self, log_dir: str) -> None:
        self.made.append(self)
        self.has_died = False
        self.steps: list[int] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if self.has_died:
            raise RuntimeError("the thread has died")
        self.steps.append(step)

    def close(self) -> None:
        pass


def test_tensorboard_goes_on_in_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "optional_import", lambda *_, **__: SimpleNamespace(SummaryWriter=Writer))
    metrics = MetricLog([TensorBoardSink(tmp_path)])
    metrics.log(1, {"x": 1.0})
    Writer.made[0].has_died = True
    for step in (2, 3, 4):
        metrics.log(step, {"x": 1.0})
    metrics.close()
    assert [writer.steps for writer in Writer.made] == [[1], [3, 4]]


def test_a_reader_of_standard_output_that_left_ends_no_run(tmp_path: Path) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    file = JsonLinesSink(tmp_path / "metrics.jsonl")
    metrics = MetricLog([LineSink(10, Gone()), file])  # type: ignore[arg-type]
    for step in (1, 2):
        metrics.log(step, {"train/lm_loss": 1.0})
    metrics.close()
    assert len(file.path.read_text().splitlines()) == 2


def test_a_defect_is_not_hidden() -> None:
    with pytest.raises(AttributeError):
        MetricLog([LineSink(10, object())]).log(1, {"train/lm_loss": 1.0})  # type: ignore[arg-type]


def test_storage_that_fails_when_a_run_starts_is_tried_again_and_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it may when a run is started again after such a failure."""

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    class Failing(Writer):
        def __init__(self, log_dir: str) -> None:
            fail() if not caplog.records else super().__init__(log_dir)

    monkeypatch.setattr(loggers, "optional_import", lambda *_, **__: SimpleNamespace(SummaryWriter=Failing))
    board = MetricLog([TensorBoardSink(tmp_path)])
    assert len(caplog.records) == 1
    board.log(1, {"x": 1.0})
    assert Writer.made[-1].steps == [1]
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fail)
        lines = MetricLog([JsonLinesSink(tmp_path / "metrics.jsonl")])
        told: list[str] = []
        file = AppendedFile(tmp_path / "logs" / "rank.log", told.append)
        file.append("lost\n")
    lines.log(1, {"x": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    file.append("kept\n")
    assert (tmp_path / "logs" / "rank.log").read_text() == "kept\n"
    assert len(told) == 2  # that it cannot be written, and that it can again


def test_a_run_whose_lines_could_not_be_printed_is_no_failure() -> None:
    with Path("/dev/full").open("w") as full, results.replaced(full):
        with MetricLog([LineSink(10, full)]) as metrics:
            metrics.log(1, {"train/lm_loss": 1.0})
        results.finish()  # as the script does at its end
