"""What `generate.py` reads and writes."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inference.small_model import SMALL, naive_greedy, save_small, small_config, small_model
from scripts_of import fork_script

from neox.data.text_files import replaced_line
from neox.data.tokenizers import CharLevelTokenizer
from neox.errors import CheckpointError, DataError, UserError
from neox.files import write_whole
from neox.inference.generate import GenerationSettings, generate
from neox.inference.loading import load_model
from neox.inference.modes import generation_kind, read_prompts, run_generation, typed_prompts
from neox.model.build import SINGLE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("small"))


def expected_text(prompt: str, count: int) -> str:
    tokens = naive_greedy(small_model(), CharLevelTokenizer().tokenize(prompt) or [0], count)[0]
    return CharLevelTokenizer().detokenize(tokens[: tokens.index(0)] if 0 in tokens else tokens)


def test_prompts_of_a_file_give_one_record_each(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one\\ntwo"}\n\n{"text": "three "}\n')
    config = small_config(
        load=str(checkpoint),
        sample_input_file=str(tmp_path / "in.jsonl"),
        sample_output_file=str(tmp_path / "out" / "samples.jsonl"),
        maximum_tokens=12,
    )
    run_generation(config, SINGLE)
    records = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().split("\n")[:-1]]
    assert [record["context"] for record in records] == ["one\ntwo", "three "]
    for record in records:
        assert list(record) == ["context", "text", "length", "finished", "message", "duration_seconds"]
        assert record["text"] == expected_text(record["context"], 12)
        assert record["length"] == 12 or record["finished"]
        assert record["duration_seconds"] > 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.jsonl"]


def test_unconditional_samples_differ_and_repeat_with_the_seed(checkpoint: Path, tmp_path: Path) -> None:
    def texts(**changes: object) -> list[str]:
        path = tmp_path / "samples.txt"
        config = small_config(
            load=str(checkpoint), num_samples=4, temperature=1.0, sample_output_file=str(path), **changes
        )
        run_generation(config, SINGLE)
        return [json.loads(line)["text"] for line in path.read_text().split("\n")[:-1]]

    first = texts()
    assert len(set(first)) == 4
    assert texts() == first
    assert texts(seed=99) != first


def test_prompts_that_are_not_read_are_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As GPT-NeoX's text_generation.yml, which names a file of prompts and asks for none."""
    given = {"text_gen_type": "unconditional", "sample_input_file": "in.txt", "maximum_tokens": 1}
    run_generation(small_config(load=str(checkpoint), sample_output_file=str(tmp_path / "out"), **given), SINGLE)
    assert capsys.readouterr().err == "sample_input_file is not read: text_gen_type is unconditional\n"


def test_prompts_without_room_for_an_answer_are_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("a\n" + "b" * 64 + "\n")
    place = {"sample_input_file": str(tmp_path / "in.txt"), "sample_output_file": str(tmp_path / "out")}
    run_generation(small_config(load=str(checkpoint), maximum_tokens=1, **place), SINGLE)
    assert capsys.readouterr().err == (
        "1 of 2 prompts: nothing generated: the prompt has 64 tokens and the model 64 positions; shorten it\n"
    )


def test_logits_are_written_on_request(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    run_generation(
        small_config(load=str(checkpoint), return_logits=True, maximum_tokens=3, sample_output_file=str(path)), SINGLE
    )
    logits = torch.tensor(json.loads(path.read_text())["logits"])
    settings = GenerationSettings(maximum_tokens=3, return_logits=True)
    (expected,) = generate(small_model(), [[0]], settings=settings, ends=[0])
    assert torch.equal(logits, expected.logits)


def test_a_session_answers_until_its_input_ends(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n"))
    run_generation(small_config(load=str(checkpoint), text_gen_type="interactive", maximum_tokens=6), SINGLE)
    shown = capsys.readouterr().out
    for prompt in ("first", "second"):
        assert expected_text(prompt, 6) in shown
    assert shown.count("Context prompt >>> ") == 3


def test_what_is_typed_in_another_encoding_does_not_end_a_session(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nsecond\n"), encoding="utf-8"))
    run_generation(small_config(load=str(checkpoint), text_gen_type="interactive", maximum_tokens=6), SINGLE)
    shown = capsys.readouterr()
    for prompt in ("caf\ufffd", "second"):
        assert expected_text(prompt, 6) in shown.out
    assert shown.err == "the prompt had bytes that are not UTF-8; each was replaced by U+FFFD\n"


@pytest.mark.parametrize(
    ("typed", "end", "prompts"),
    [
        ("one\ntwo\n", "\n", ["one", "two"]),
        ("one\ntwo\nEND\nthree", "END", ["one\ntwo\n", "three"]),
        ("one END rest\ntwo END\n", "END", ["one ", "two "]),
        ("", "\n", []),
    ],
)
def test_a_prompt_ends_where_prompt_end_appears(typed: str, end: str, prompts: list[str]) -> None:
    assert list(typed_prompts(io.StringIO(typed), end)) == prompts


def test_the_mode_follows_from_the_input_file() -> None:
    assert generation_kind(small_config()) == "unconditional"
    assert generation_kind(small_config(sample_input_file="x.txt")) == "input-file"
    assert generation_kind(small_config(sample_input_file="x.txt", text_gen_type="interactive")) == "interactive"
    with pytest.raises(DataError, match="set sample_input_file"):
        generation_kind(small_config(text_gen_type="input-file"))


def test_plain_lines_are_prompts_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b'  indented\r\n\n{"text": 1}\ntrailing \n')
    assert read_prompts(path) == ["  indented", '{"text": 1}', "trailing "]
    path.write_bytes("\ufeffone\ntwo".encode())
    assert read_prompts(path) == ["one", "two"]


def test_prompts_of_json_lines_may_be_compressed_and_have_lone_surrogates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(gzip.compress("\ufeff".encode() + b'{"text": "one"}\n{"text": "half \\ud83d"}\n'))
    assert read_prompts(path) == ["one", "half \ufffd"]
    assert capsys.readouterr().err == f"{path}: {replaced_line(1)}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.txt", None, "no such file"),
        ("empty.txt", "\n  \n", "holds no prompt"),
        ("bad.jsonl", '{"text": "a"}\n{"prompt": "b"}\n', r"bad.jsonl:2: key 'text' is missing; the line has prompt"),
        ("broken.jsonl", '{"text": \n', r"broken.jsonl:1: not valid JSON"),
        ("deep.jsonl", "[" * 100_000 + "]" * 100_000, r"deep.jsonl:1: not valid JSON"),
        ("latin1.txt", b"one\n\ncaf\xe9\n", r"latin1.txt:3: cannot be read as UTF-8 \(byte 0xe9 in column 4\)"),
        ("latin1.jsonl", b'{"text": "caf\xe9"}', r"latin1.jsonl:1: cannot be read as UTF-8"),
        ("cut.txt.gz", gzip.compress(b"one\ntwo\n", mtime=0)[:-9], r"cut.txt.gz:\d: the compressed file is cut off"),
    ],
)
def test_a_bad_prompt_file_is_named_with_its_line(
    name: str, content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_place_for_samples_is_looked_for_before_the_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/samples\.txt: cannot be written \(its parent is a file"):
        run_generation(small_config(sample_output_file=str(tmp_path / "file" / "samples.txt")), SINGLE)


def test_samples_do_not_replace_their_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    with pytest.raises(UserError, match=r"prompts\.txt: is read too, and writing would replace it"):
        run_generation(small_config(sample_input_file=str(prompts), sample_output_file=str(prompts)), SINGLE)
    assert prompts.read_text() == "one\n"


def test_loading_without_a_usable_checkpoint_says_what_to_set(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="load: not set"):
        load_model(small_config(), SINGLE)
    with pytest.raises(CheckpointError, match="global_step8"):
        load_model(small_config(load=str(checkpoint), iteration=8), SINGLE)
    with pytest.raises(CheckpointError, match="has shape"):
        load_model(small_config(load=str(checkpoint), hidden_size=64), SINGLE)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    folder = save_small(tmp_path, padded_vocab_size=384)
    with pytest.raises(CheckpointError, match=r"has 384 rows of vocabulary and the tokenizer 512 tokens"):
        load_model(small_config(load=str(folder)), SINGLE)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / "file" / "samples.txt", "")


def run_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return fork_script("generate.py", folder / "small.yml", *arguments, cwd=folder)


def test_the_script_starts_tensor_ranks_and_writes_one_file(checkpoint: Path, tmp_path: Path) -> None:
    # A configuration trained at pipeline 2 generates without a pipeline.
    keys = SMALL | {"load": str(checkpoint), "model_parallel_size": 2, "pipe_parallel_size": 2}
    (tmp_path / "small.yml").write_text(json.dumps(keys))
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    result = run_script(tmp_path, "-i", "prompts.txt", "-o", "out.jsonl", "-m", "5")
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().split("\n")[:-1]]
    assert [record["text"] for record in records] == [expected_text("one", 5), expected_text("two", 5)]


def test_the_script_tells_a_mistake_in_one_line_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "small.yml").write_text(json.dumps(SMALL))
    result = run_script(tmp_path, "-m", "5")
    assert result.returncode == 2
    assert result.stderr.startswith("load: not set")
    assert result.stderr.count("\n") == 1
