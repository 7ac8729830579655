import json
import sysconfig
from pathlib import Path

import pytest

from neox.errors import DataError
from neox.quickstart.corpus import build_corpus


def names(path: Path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text(encoding="utf-8").splitlines()]


def make_library(folder: Path, count: int = 200) -> Path:
    for number in range(count):
        folder.mkdir(exist_ok=True)
        (folder / f"module{number}.py").write_text(f"value = {number}  # é\n", encoding="utf-8")
    return folder


def test_the_standard_library_of_the_interpreter_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library(tmp_path / "library", 1000)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(library)}.__getitem__)
    corpus = build_corpus(tmp_path / "out")
    assert corpus.train_files == len(names(corpus.train))
    assert {*names(corpus.train), *names(corpus.held_out)} == {path.name for path in library.iterdir()}
    # A name is held out at a rate of 5%: of 1000 names 50, with a standard deviation of 7.
    assert 29 < corpus.held_out_files < 71


def test_no_file_and_no_text_is_on_both_sides(tmp_path: Path) -> None:
    library = make_library(tmp_path / "library")
    for path in list(library.iterdir()):
        (library / f"copy_of_{path.name}").write_bytes(path.read_bytes())
    corpus = build_corpus(tmp_path / "out", library=library)
    train, held_out = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in (corpus.train, corpus.held_out)
    )
    assert not {r["name"] for r in train} & {r["name"] for r in held_out}
    assert not {r["text"] for r in train} & {r["text"] for r in held_out}


def test_a_file_is_on_the_same_side_whatever_else_there_is(tmp_path: Path) -> None:
    few = build_corpus(tmp_path / "few", library=make_library(tmp_path / "a", 100))
    many = build_corpus(tmp_path / "many", library=make_library(tmp_path / "b", 200))
    assert set(names(few.held_out)) < set(names(many.held_out))
    assert set(names(few.train)) < set(names(many.train))


def test_bytes_are_those_of_the_text(tmp_path: Path) -> None:
    corpus = build_corpus(tmp_path / "out", library=make_library(tmp_path / "library"))
    texts = [json.loads(line)["text"] for line in corpus.held_out.read_text(encoding="utf-8").splitlines()]
    assert corpus.held_out_bytes == sum(len(text.encode()) for text in texts)
    assert corpus.held_out_bytes > sum(map(len, texts))  # the é has two bytes


def test_what_is_left_out(tmp_path: Path) -> None:
    library = make_library(tmp_path / "library")
    (library / "copy.py").write_text("value = 7  # é\n", encoding="utf-8")  # same text as module7.py
    (library / "latin.py").write_bytes("# é\n".encode("latin-1"))
    (library / "empty.py").write_text("\n")
    for folder in ("test", "site-packages", "encodings"):
        (library / folder).mkdir()
        (library / folder / "module.py").write_text(f"{folder!r}\n")
    corpus = build_corpus(tmp_path / "out", library=library)
    found = names(corpus.train) + names(corpus.held_out)
    assert "copy.py" in found  # it comes before module7.py
    assert "module7.py" not in found
    assert not {"latin.py", "empty.py"} & set(found)
    assert not [name for name in found if "/" in name]


def test_an_interpreter_without_sources_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "library").mkdir()
    with pytest.raises(DataError, match=r"0 usable \.py files"):
        build_corpus(tmp_path / "out", library=tmp_path / "library")
