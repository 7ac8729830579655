"""Preprocessing that cannot be done: one line that says where and why, and no dataset that looks whole."""

import errno
import json
import multiprocessing
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from scripts_of import fork_script, run_script
from tokenizers import models, pre_tokenizers

from neox.data import IndexedDataset, IndexedDatasetWriter, preprocess
from neox.data.indexed_writer import IndexedDatasetWriters
from neox.data.preprocess import PreprocessOptions, _end_with_parent
from neox.errors import DataError, UserError
from neox.files import require_place, whole_file, write_new

CHARACTERS = ("--tokenizer-type", "CharLevelTokenizer")


def jsonl(path: Path, *texts: str, key: str = "text") -> Path:
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return path


def run(inputs: list[Path], prefix: Path, **changes):
    settings = {"tokenizer_type": "CharLevelTokenizer", "progress": False, **changes}
    return preprocess.preprocess(PreprocessOptions(inputs=inputs, output_prefix=str(prefix), **settings))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """Writing more than so many bytes to a file fails, as on a disk without room."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "x", "n": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"text": "x", "n": ' + "9" * 5000 + "}",
        '{"text": "x", "n": }',
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_lines_that_json_cannot_read_are_named(line: str, workers: int, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"in\.jsonl:2: not valid JSON \(") as caught:
        run([tmp_path / "in.jsonl"], tmp_path / "out", workers=workers)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["in.jsonl"]


def test_a_text_that_the_tokenizer_cannot_take_is_named(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"one": 0, "two": 1, "</s>": 2}, unk_token="absent"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "t.json"))
    changes = {"tokenizer_type": "HFTokenizer", "vocab_file": str(tmp_path / "t.json")}
    source = jsonl(tmp_path / "in.jsonl", "one two", "two", "three one")
    with pytest.raises(DataError, match=r"in\.jsonl:3: the tokenizer cannot take this text"):
        run([source], tmp_path / "out", **changes)
    assert run([source], tmp_path / "out", **changes, num_docs=2).tokens == {"text": 3}


def test_a_killed_worker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, batch = IndexedDatasetWriter.add_documents, preprocess.BATCH_DOCUMENTS
    assert batch > 1

    def add_and_kill(self, tokens, sizes) -> None:
        add(self, tokens, sizes)
        for worker in multiprocessing.active_children():
            worker.kill()

    monkeypatch.setattr(preprocess, "BATCH_DOCUMENTS", 1)
    monkeypatch.setattr(IndexedDatasetWriter, "add_documents", add_and_kill)
    source = jsonl(tmp_path / "in.jsonl", *map(str, range(100)))
    with pytest.raises(DataError, match=r"a worker process was killed; out of memory\? use fewer --workers than 2"):
        run([source], tmp_path / "out", workers=2)
    assert names(tmp_path) == ["in.jsonl"]


def test_workers_that_cannot_be_started_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(preprocess.ProcessPoolExecutor, "submit", refuse)
    with pytest.raises(DataError, match=r"--workers 9: that many processes cannot be started \(no more processes\)"):
        run([jsonl(tmp_path / "in.jsonl", "a")], tmp_path / "out", workers=9)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_line_and_leaves_the_old_dataset(workers: int, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "in.jsonl", *["some text " * 100] * 400)
    run([jsonl(tmp_path / "old.jsonl", "old")], tmp_path / "out")
    with (
        pytest.raises(DataError, match=r"out_text_document\.bin: cannot be written \(.*\); free space"),
        full_disk(100_000),
    ):
        run([source], tmp_path / "out", workers=workers)
    assert [bytes(row.tolist()) for row in IndexedDataset(tmp_path / "out_text_document")] == [b"old"]
    assert names(tmp_path) == ["in.jsonl", "old.jsonl", "out_text_document.bin", "out_text_document.idx"]


def test_datasets_of_one_run_appear_together_or_not_at_all(tmp_path: Path) -> None:
    def write(token: int, documents: dict[str, int]) -> None:
        with IndexedDatasetWriters() as writers:
            for name, count in documents.items():
                writers.open(tmp_path / name, "uint16").add_documents(np.full(count, token), [1] * count)

    write(1, {"a": 1, "b": 1})
    with pytest.raises(DataError, match=r"b\.bin: cannot be written"), full_disk(100_000):
        write(2, {"a": 1, "b": 10_000})  # whose 20,000 bytes have room, and the 200,000 of the index have not
    for name in ("a", "b"):
        assert [row.tolist() for row in IndexedDataset(tmp_path / name)] == [[1]], name
    assert names(tmp_path) == ["a.bin", "a.idx", "b.bin", "b.idx"]
    write(3, {"a": 1, "b": 2})
    assert [row.tolist() for row in IndexedDataset(tmp_path / "b")] == [[3], [3]]


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "out_text_document.idx").mkdir()
    with pytest.raises(DataError, match=r"out_text_document\.idx: a folder has this name"):
        run([jsonl(tmp_path / "in.jsonl", "a")], tmp_path / "out")
    assert names(tmp_path) == ["in.jsonl", "out_text_document.idx"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-docs", -5), "--num-docs: -5 is not a whole number of at least 1"),
        (("--num-docs", 0), "--num-docs: 0 is not a whole number of at least 1"),
        (("--workers", 0), "--workers: 0 is not a whole number of at least 1"),
        (("--log-interval", 0), "--log-interval: 0 is not a whole number of at least 1"),
        (("--jsonl-keys", "text", "text"), "--jsonl-keys: text is named twice"),
        (("--output-prefix", "in.jsonl/out"), "out_text_document.bin: cannot be written (its parent is a file"),
        (("--input", "a,in.jsonl"), "a: no such file"),
    ],
)
def test_flags_that_cannot_be_meant_are_one_line(
    flags: tuple, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "in.jsonl", "text")
    given = ["--input", "in.jsonl", "--output-prefix", "out", *CHARACTERS, *flags]
    assert run_script("tools/datasets/preprocess_data.py", *given) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last
    assert names(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--vocab-size", -1), "--vocab-size: -1 is not a whole number of at least 1"),
        (("--output", "in.jsonl/t.json"), "in.jsonl/t.json: cannot be written (its parent is a file, not a folder"),
        (("--output", "."), "cannot be written (it is no file)"),
        (("--output", "./in.jsonl"), "in.jsonl: is read too, and writing would replace it; name another file to write"),
        (("--input", ".", "--output", "in.jsonl"), "in.jsonl: is read too, and writing would replace it"),
        (("--input", "empty.jsonl"), "empty.jsonl: no text; nothing to train on"),
        (("--input", "blank.txt"), "blank.txt: no text; nothing to train on"),
    ],
)
def test_a_tokenizer_that_cannot_be_trained_is_one_line(
    flags: tuple, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "in.jsonl", "text")
    jsonl(tmp_path / "empty.jsonl", "", "")
    (tmp_path / "blank.txt").touch()
    before = names(tmp_path)
    given = ["--input", "in.jsonl", "--output", "t.json", "--vocab-size", 300, *flags]
    assert run_script("tools/datasets/train_tokenizer.py", *given) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert names(tmp_path) == before
    assert json.loads((tmp_path / "in.jsonl").read_text()) == {"text": "text"}


def test_a_traceback_is_no_answer_to_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl.gz").write_bytes(b"plain text\n")
    made = fork_script(
        "tools/datasets/preprocess_data.py", "--input", tmp_path / "in.jsonl.gz", "--output-prefix", tmp_path / "out",
        *CHARACTERS, "--workers", 2,
    )  # fmt: skip
    assert made.returncode == 2
    assert made.stdout == ""
    assert "Traceback" not in made.stderr
    assert f"{tmp_path}/in.jsonl.gz:1: the compressed file is damaged" in made.stderr.strip().splitlines()[-1]


def test_what_two_processes_write_under_one_name_is_not_mixed(tmp_path: Path) -> None:
    """They may have the same number too, in containers on two hosts."""
    with whole_file(tmp_path / "a") as first, whole_file(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first"
    with IndexedDatasetWriter(tmp_path / "b", np.uint16) as one:
        one.add_document([1, 2])
        with IndexedDatasetWriter(tmp_path / "b", np.uint16) as other:
            other.add_document([3])
    assert IndexedDataset(tmp_path / "b")[0].tolist() == [1, 2]
    assert names(tmp_path) == ["a", "b.bin", "b.idx"]


def test_new_files_replace_none(tmp_path: Path) -> None:
    made = [write_new(tmp_path / "out" / "a.json", text) for text in "xyz"]
    assert [path.name for path in made] == ["a.json", "a-2.json", "a-3.json"]
    assert [path.read_text() for path in made] == list("xyz")
    with pytest.raises(UserError, match="cannot be written"):
        write_new(made[0] / "below", "x")


def test_a_place_is_tried_before_the_work(tmp_path: Path) -> None:
    require_place(tmp_path / "new" / "file")
    assert names(tmp_path) == ["new"]
    assert names(tmp_path / "new") == []
    (tmp_path / "new" / "file").write_text("old")
    require_place(tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_text() == "old"
    for place in (tmp_path / "new", tmp_path / "new" / "file" / "below", Path("/dev/null")):
        with pytest.raises(UserError, match="cannot be written"):
            require_place(place)


def _die_before_a_worker(answers: Connection) -> None:
    def work() -> None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        answers.send("ready")
        signal.pause()

    multiprocessing.get_context("fork").Process(target=work).start()
    signal.pause()


def test_workers_end_with_the_process_that_was_killed() -> None:
    """They wait for work, and nothing else would tell them; the pipe ends when they have."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    command = context.Process(target=_die_before_a_worker, args=(sender,))
    command.start()
    sender.close()
    assert receiver.recv() == "ready"
    command.kill()
    assert receiver.poll(240)
    with pytest.raises(EOFError):
        receiver.recv()
