"""Text files: frames and members to their ends, damage with its line, byte-order marks, lone surrogates."""

import bz2
import gzip
import os
from pathlib import Path

import pytest
import zstandard

from neox.data.documents import input_paths, read_documents
from neox.data.text_files import SurrogateFilter, text_lines, whole_text
from neox.errors import DataError

ROWS = "".join(f'{{"text": "row {number} of some, {number * 7919 % 104729}"}}\n' for number in range(3000))
SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"abcde"


def zst(text: str) -> bytes:
    """One frame with a checksum."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(text.encode())


def gz(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)


def read(folder: Path, name: str, content: bytes) -> str:
    """What is read of a file with this content."""
    (folder / name).write_bytes(content)
    return "".join(document.raw for document in read_documents([folder / name]))


def failure(folder: Path, name: str, content: bytes) -> str:
    """The message that reading it ends with, after the folder's name."""
    with pytest.raises(DataError) as caught:
        read(folder, name, content)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder}/")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        ("zst", zst(ROWS)),
        ("zst", zst(ROWS[:5000]) + zst(ROWS[5000:])),
        ("zst", SKIPPABLE + zst(ROWS[:7]) + SKIPPABLE + zst("") + zst(ROWS[7:]) + SKIPPABLE),
        ("gz", gz(ROWS)),
        ("gz", gz(ROWS[:5000]) + gz(ROWS[5000:])),
        ("gz", gz(ROWS) + bytes(100)),  # padding that tapes have, which gzip passes over too
    ],
)
def test_whole_files_are_read_to_their_end(kind: str, suffix: str, content: bytes, tmp_path: Path) -> None:
    assert read(tmp_path, f"in.{kind}.{suffix}", content) == ROWS


def test_a_long_window_is_read(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)  # twice the package's limit
    compressor = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    assert read(tmp_path, "in.txt.zst", compressor.compress(ROWS.encode()) + compressor.flush()) == ROWS


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("compress", [zst, gz])
def test_a_cut_is_refused_wherever_it_is(kind: str, compress, tmp_path: Path) -> None:
    name = f"in.{kind}.{'zst' if compress is zst else 'gz'}"
    whole = compress(ROWS)
    for content in (b"", whole[:3], whole[: len(whole) // 2], whole[:-1], whole + whole[: len(whole) // 2]):
        assert "cut off here; download or copy it again" in failure(tmp_path, name, content), len(content)


def test_a_cut_at_the_end_of_a_line_is_refused_there(tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor().compressobj()
    flushed = frame.compress(ROWS.encode()) + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    assert failure(tmp_path, "in.jsonl.zst", flushed).startswith("in.jsonl.zst:3001: the compressed file is cut off")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.jsonl.zst", zst(ROWS) + b"garbage"),
        ("in.jsonl.gz", gz(ROWS) + b"garbage"),
        ("in.jsonl.gz", gz(ROWS)[:-8] + bytes([gz(ROWS)[-8] ^ 0xFF]) + gz(ROWS)[-7:]),
    ],
)
def test_damage_behind_the_text_is_named_with_its_line(name: str, content: bytes, tmp_path: Path) -> None:
    assert failure(tmp_path, name, content).startswith(f"{name}:3001: the compressed file is damaged")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("in.txt.zst", ROWS.encode()),
        ("in.txt.gz", ROWS.encode()),
        ("in.txt.gz", bz2.compress(ROWS.encode())),
        ("in.txt.zst", zst(ROWS)[:-1] + bytes([zst(ROWS)[-1] ^ 0xFF])),  # the checksum
        ("in.txt.gz", gz(ROWS)[:100] + bytes(50) + gz(ROWS)[150:]),
        ("in.txt.zst", zst(ROWS)[:100] + bytes(50) + zst(ROWS)[150:]),
    ],
)
def test_other_content_and_damage_within_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    assert failure(tmp_path, name, content).startswith(f"{name}: the compressed file is damaged, or of another")


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.jsonl.gz", "in.txt.zst"])
def test_text_in_another_encoding_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    text = (ROWS + "one caf").encode() + b"\xe9\nend\n"
    content = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rpartition(".")[2], bytes)(text)
    assert failure(tmp_path, name, content).startswith(f"{name}:3001: cannot be read as UTF-8 (byte 0xe9 in column 8)")


@pytest.mark.parametrize("compress", [str.encode, gz, zst])
def test_a_byte_order_mark_at_the_start_is_no_text(compress, tmp_path: Path) -> None:
    path = tmp_path / f"in.txt{ {gz: '.gz', zst: '.zst'}.get(compress, '') }"
    path.write_bytes(compress("\ufeffone\n\ufefftwo\n"))
    assert list(text_lines(path)) == [(1, "one\n"), (2, "\ufefftwo\n")]
    assert whole_text(path) == "one\n\ufefftwo\n"
    path.write_bytes(compress("\ufeff"))
    assert whole_text(path) == ""


def test_lines_end_where_they_say_so(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes("a\r\nb\u2028c\rd\n\ne".encode())
    assert [line for _, line in text_lines(tmp_path / "in.txt")] == ["a\r\n", "b\u2028c\rd\n", "\n", "e"]


def test_files_that_cannot_be_opened_are_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / f"{'x' * 300}.txt", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            whole_text(path)
    with pytest.raises(DataError, match="cannot be read"):
        list(read_documents([tmp_path / f"{'x' * 300}.txt"]))


def test_a_folder_stands_for_its_files_but_for_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.jsonl", ".b.jsonl", "._b.jsonl", "a.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.txt").mkdir()
    assert [document.raw for document in read_documents([tmp_path])] == ["a.txt", "b.jsonl"]
    assert [document.raw for document in read_documents([tmp_path / ".b.jsonl"])] == [".b.jsonl"]
    (tmp_path / "c.txt").symlink_to(tmp_path / "absent")
    with pytest.raises(DataError, match=r"c\.txt: cannot be read"):
        list(read_documents([tmp_path]))


def test_what_is_not_read_of_a_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "b.jsonl.xz", ".hidden"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "more").mkdir()
    assert len(list(read_documents([tmp_path]))) == 1
    assert caplog.messages == [f"{tmp_path}: not read, as they are no .jsonl or .txt files: b.jsonl.xz, more"]
    caplog.clear()
    assert len(list(read_documents([tmp_path / "a.jsonl"]))) == 1
    assert caplog.messages == []


def test_lone_surrogates_are_replaced_and_counted() -> None:
    clean = SurrogateFilter()
    whole = {"a": ["x", {"b": "\U0001f600 é"}], "n": [1, None, 2.5, True]}
    assert clean(whole) == whole
    assert clean.documents == 0
    assert clean("half \ud83d of, \ude00") == "half \ufffd of, \ufffd"
    assert clean(["ok", "\ud83d\ud83d"]) == ["ok", "\ufffd\ufffd"]
    assert clean({"a": [{"b": "\udc00"}, "é"]}) == {"a": [{"b": "\ufffd"}, "é"]}
    assert clean("\ud83d\ude00") == "\U0001f600"  # both halves
    assert clean.documents == 4


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for given in (tmp_path / "pipe.jsonl", tmp_path):
        with pytest.raises(DataError, match=r"pipe\.jsonl: not a regular file; save what it gives to one"):
            list(read_documents([given]))


def test_many_files_in_one_word_are_no_long_name() -> None:
    assert input_paths([",".join(f"part{number}.jsonl" for number in range(100))])[99] == "part99.jsonl"
