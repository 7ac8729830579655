"""Text to .bin/.idx: keys, order, workers, compressed inputs, mistakes, and the command itself."""

import gzip
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import zstandard
from byte_tokenizer import byte_tokenizer
from scripts_of import fork_script
from tokenizers import models

from neox.data import IndexedDataset
from neox.data.documents import input_paths, read_documents
from neox.data.preprocess import PreprocessOptions, preprocess
from neox.data.text_files import replaced_line
from neox.errors import DataError

TEXTS = [f"document {number} " * (number % 7 + 1) for number in range(1300)]


def _jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _run(inputs: list[Path], folder: Path, **changes):
    settings = {"tokenizer_type": "CharLevelTokenizer", "progress": False, **changes}
    return preprocess(PreprocessOptions(inputs=inputs, output_prefix=str(folder / "out"), **settings))


def _texts(prefix: Path) -> list[str]:
    return [bytes(row.tolist()).decode() for row in IndexedDataset(prefix)]


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_keep_their_order(workers: int, tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    summary = _run([source], tmp_path, workers=workers)
    assert _texts(tmp_path / "out_text_document") == TEXTS
    assert summary.documents == 1300
    assert summary.tokens == {"text": sum(map(len, TEXTS))}
    assert IndexedDataset(tmp_path / "out_text_document").dtype == np.uint16


def test_each_key_goes_to_its_own_files_and_they_stay_aligned(tmp_path: Path) -> None:
    records = [{"q": "one", "a": "two"}, {"q": "", "a": ""}, {"q": "", "a": "three"}, {"q": "x", "a": "y"}]
    summary = _run([_jsonl(tmp_path / "in.jsonl", records)], tmp_path, jsonl_keys=["q", "a"], append_eod=True)
    assert _texts(tmp_path / "out_q_document") == ["one\0", "\0", "x\0"]
    assert _texts(tmp_path / "out_a_document") == ["two\0", "three\0", "y\0"]
    assert (summary.documents, summary.empty) == (3, 1)


def test_plain_and_compressed_files_and_folders(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("line one\nline two\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\n\n{"text": "twice"}\n')
    (folder / "ignored.md").write_text("no")
    _run([folder], tmp_path, num_docs=2)
    assert _texts(tmp_path / "out_text_document") == ["line one\nline two\n", "packed"]


def test_zstandard_files(tmp_path: Path) -> None:
    frames = [zstandard.compress(b'{"text": "%d"}\n' % number) for number in range(2)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    assert [document.raw for document in read_documents([tmp_path / "a.jsonl.zst"])] == [
        '{"text": "0"}\n', '{"text": "1"}\n'
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"in\.jsonl:2: not valid JSON"),
        ('{"text": "a"}\n\n["b"]\n', r"in\.jsonl:3: a JSON list"),
        ('{"body": "a", "id": 1}\n', r"in\.jsonl:1: key 'text' is missing; the line has body, id"),
        ('{"text": 5}\n', r"in\.jsonl:1: key 'text' is not text"),
        ('{"text": ""}\n', "no document with text"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_named_and_nothing_is_left(content: str, message: str, workers: int, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        _run([tmp_path / "in.jsonl"], tmp_path, workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("name", "message"), [("none.jsonl", "no such file"), ("in.csv", "unknown kind"), ("bad.txt", "UTF-8")]
)
def test_bad_files_are_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("a,b")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(DataError, match=message):
        _run([tmp_path / name], tmp_path)


def _command(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    return fork_script(f"tools/datasets/{tool}", *arguments)


def test_the_commands_train_a_tokenizer_and_tokenize_with_it(tmp_path: Path) -> None:
    one = _jsonl(tmp_path / "one.jsonl", [{"text": text} for text in TEXTS[:50]])
    two = _jsonl(tmp_path / "two.jsonl", [{"text": "the end"}])
    vocab = tmp_path / "t.json"
    trained = _command("train_tokenizer.py", "--input", one, two, "--output", vocab, "--vocab-size", 300)
    assert trained.returncode == 0, trained.stderr
    made = _command(
        "preprocess_data.py", "--input", f"{one},{two}", "--output-prefix", tmp_path / "out", "--append-eod",
        "--tokenizer-type", "HFTokenizer", "--vocab-file", vocab, "--workers", 2, "--num-docs", 51,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "51 documents" in made.stdout
    corpus = IndexedDataset(tmp_path / "out_text_document")
    assert len(corpus) == 51
    assert all(row[-1] == 0 for row in corpus)


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path: Path) -> None:
    made = _command(
        "preprocess_data.py", "--input", tmp_path / "no.jsonl", "--output-prefix", tmp_path / "out",
        "--tokenizer-type", "CharLevelTokenizer",
    )  # fmt: skip
    assert made.returncode == 2
    assert made.stderr.strip().splitlines()[-1].endswith("no.jsonl: no such file; check the path")


def test_lone_surrogates_are_replaced_and_counted(tmp_path: Path) -> None:
    source = _jsonl(
        tmp_path / "in.jsonl",
        [
            {"a": "fine", "b": "\U0001f600"},
            {"a": "half \ud83d of", "b": "\udc00"},
            {"a": "x", "b": "y", "other": "\ud83d"},
        ],
    )
    summary = _run([source], tmp_path, jsonl_keys=["a", "b"])
    assert _texts(tmp_path / "out_a_document") == ["fine", "half \ufffd of", "x"]
    assert _texts(tmp_path / "out_b_document") == ["\U0001f600", "\ufffd", "y"]
    assert summary.replaced == 1  # what is not tokenized is not replaced
    fixed = _run([source], tmp_path, jsonl_keys=["a", "b"], ftfy=True)
    assert fixed.replaced == 1
    assert _texts(tmp_path / "out_b_document") == ["\U0001f600", "\ufffd", "y"]


def test_the_commands_say_how_many_documents_had_lone_surrogates(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "in.jsonl", [{"text": f"some \udc00 text {number}"} for number in range(3)])
    vocab = tmp_path / "t.json"
    trained = _command("train_tokenizer.py", "--input", source, "--output", vocab, "--vocab-size", 300)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[1:] == [replaced_line(3)]
    made = _command(
        "preprocess_data.py", "--input", source, "--output-prefix", tmp_path / "out", "--workers", 2,
        "--tokenizer-type", "HFTokenizer", "--vocab-file", vocab,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[1:] == trained.stdout.splitlines()[1:]
    tokenizer = tokenizers.Tokenizer.from_file(str(vocab))
    rows = IndexedDataset(tmp_path / "out_text_document")
    assert tokenizer.decode(rows[2].tolist()) == "some \ufffd text 2"


@pytest.mark.parametrize(
    ("template", "eod", "around"),
    [
        ("$A </s>", False, ([], [257])),
        ("$A </s>", True, ([], [257])),  # once
        ("<s> $A </s>", True, ([256], [257])),
        ("<s> $A", False, ([256], [])),
        ("<s> $A", True, ([256], [257])),
        ("$A </s> <sep>", True, ([], [257, 258, 257])),
        ("<s> $A <sep>", True, ([256], [258, 257])),
    ],
)
def test_a_document_ends_once_whatever_the_tokenizer_puts_around_it(
    template: str, eod: bool, around: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    byte_tokenizer(["<s>", "</s>", "<sep>"], template=template).save(str(tmp_path / "t.json"))
    changes = {"tokenizer_type": "HFTokenizer", "vocab_file": str(tmp_path / "t.json")}
    source = _jsonl(tmp_path / "in.jsonl", [{"text": "abc"}, {"text": ""}])
    summary = _run([source], tmp_path, append_eod=eod, **changes)
    row = IndexedDataset(tmp_path / "out_text_document")[0].tolist()
    before, after = around
    assert row[: len(before)] == before
    assert len(row) == len(before) + 3 + len(after)
    assert row[len(before) + 3 :] == after
    assert (summary.documents, summary.empty) == (1, 1)  # what stands around an empty text is no text


def test_no_end_of_documents_is_said_before_workers_start(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    backend.save(str(tmp_path / "t.json"))
    changes = {"tokenizer_type": "HFTokenizer", "vocab_file": str(tmp_path / "t.json"), "workers": 2}
    source = _jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"t\.json: has no <\|endoftext\|> nor another end-of-document token"):
        _run([source], tmp_path, append_eod=True, **changes)
    assert _run([source], tmp_path, **changes).tokens == {"text": 1}


def test_a_comma_divides_inputs_unless_it_is_in_a_name(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "a.jsonl,b.jsonl"):
        _jsonl(tmp_path / name, [{"text": name}])
    one, two = f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"
    assert input_paths([f"{one},{two}", two]) == [one, two, two]
    assert input_paths([f"{one},b.jsonl"]) == [f"{one},b.jsonl"]
    assert input_paths([f"{one},", two]) == [one, two]
