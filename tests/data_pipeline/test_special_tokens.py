"""What begins a text and what ends one: by the tokenizer, and by the files that transformers writes beside it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from byte_tokenizer import byte_tokenizer
from tokenizers import models, processors

from neox.data.tokenizers import SentencePieceTokenizer, prompt_tokens
from neox.data.tokenizers.fast import FastTokenizer, hf_tokenizer
from neox.errors import DataError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
END_OF_TEXT, TURN, TURN_END, BEGINNING = range(256, 260)


def saved(folder: Path, *, special: list[str] = SPECIAL, template: str = "", **beside: Any) -> FastTokenizer:
    """A tokenizer of bytes, with JSON files beside it."""
    folder.mkdir(exist_ok=True)
    byte_tokenizer(special, template=template).save(str(folder / "tokenizer.json"))
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return hf_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("beside", "ends"),
    [
        ({}, (END_OF_TEXT,)),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, (TURN_END, END_OF_TEXT)),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, (TURN_END, END_OF_TEXT)),
        ({"special_tokens_map": {"eos_token": "<|im_end|>"}}, (TURN_END, END_OF_TEXT)),
        ({"generation_config": {"eos_token_id": [7, TURN_END]}}, (7, TURN_END, END_OF_TEXT)),
        ({"config": {"eos_token_id": TURN_END}}, (TURN_END, END_OF_TEXT)),
        # What generate of transformers reads; config.json counts where there is nothing else.
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": TURN_END}}, (TURN_END, END_OF_TEXT)),
        ({"config": {"eos_token_id": 5}, "generation_config": {"eos_token_id": None}}, (5, END_OF_TEXT)),
        (
            {"tokenizer_config": {"eos_token": "<|im_end|>"}, "generation_config": {"eos_token_id": [END_OF_TEXT, 9]}},
            (TURN_END, END_OF_TEXT, 9),
        ),
    ],
)
def test_a_text_ends_at_every_token_that_is_named(tmp_path: Path, beside: dict[str, Any], ends: tuple[int]) -> None:
    tokenizer = saved(tmp_path, **beside)
    assert tokenizer.ends == ends
    assert tokenizer.eod == END_OF_TEXT  # documents end as before
    assert tokenizer.special == {END_OF_TEXT, TURN, TURN_END, BEGINNING}


def test_files_beside_a_vocabulary_of_another_name_belong_to_something_else(tmp_path: Path) -> None:
    saved(tmp_path, config={"eos_token_id": 5})
    (tmp_path / "tokenizer.json").rename(tmp_path / "20B_tokenizer.json")
    assert hf_tokenizer(tmp_path / "20B_tokenizer.json").ends == (END_OF_TEXT,)


def test_a_vocabulary_with_the_end_of_turns_alone_serves(tmp_path: Path) -> None:
    alone = saved(tmp_path / "alone", special=["<|im_end|>"])
    assert alone.tokenize("a") == [ord("a") - ord("!")]
    assert alone.ends == ()
    with pytest.raises(DataError, match=r"tokenizer\.json: has no <\|endoftext\|> .* are <\|im_end\|>; add"):
        _ = alone.eod
    named = saved(tmp_path / "named", special=["<|im_end|>"], tokenizer_config={"eos_token": "<|im_end|>"})
    assert (named.eod, named.ends, named.start) == (256, (256,), 256)


@pytest.mark.parametrize(
    ("name", "content"),
    [("generation_config", '{"eos_token_id": "x"}'), ("config", "[]"), ("special_tokens_map", "[" * 100_000)],
    ids=["kind", "list", "deep"],
)
def test_a_malformed_file_beside_is_named(tmp_path: Path, name: str, content: str) -> None:
    saved(tmp_path)
    (tmp_path / f"{name}.json").write_text(content)
    with pytest.raises(DataError, match=rf"{name}\.json: ") as raised:
        hf_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(raised.value)


def test_the_beginning_of_a_text_is_there_once(tmp_path: Path) -> None:
    tokenizer, plain = saved(tmp_path / "adds", template="<s> $A"), saved(tmp_path / "plain")
    text = plain.tokenize("hi")
    assert tokenizer.prefix == (BEGINNING,)
    assert plain.prefix == ()
    for spelled in ("hi", "<s>hi"):
        assert tokenizer.tokenize(spelled) == prompt_tokens(tokenizer, spelled) == [BEGINNING, *text]
        assert tokenizer.tokenize_batch([spelled, ""]) == [[BEGINNING, *text], [BEGINNING]]
    assert tokenizer.tokenize_bare("hi") == text
    assert prompt_tokens(tokenizer, "") == [BEGINNING]
    assert prompt_tokens(plain, "<s>hi") == [BEGINNING, *text]
    assert prompt_tokens(plain, "") == []


def test_a_prompt_has_no_end(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path, template="<s> $A <|im_end|>")
    text = tokenizer.tokenize_bare("hi")
    assert tokenizer.tokenize("hi") == [BEGINNING, *text, TURN_END]
    assert prompt_tokens(tokenizer, "hi") == [BEGINNING, *text]


def test_an_empty_context_is_what_begins_a_text_else_what_ends_one(tmp_path: Path) -> None:
    both = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    for number, (template, named, start) in enumerate(
        [
            ("<s> $A", both, BEGINNING),
            ("", both, TURN),
            ("", {"eos_token": "<|im_end|>"}, TURN_END),
            ("", {}, END_OF_TEXT),
        ]
    ):
        assert saved(tmp_path / str(number), template=template, tokenizer_config=named).start == start


def test_a_beginning_with_the_id_0_counts(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "<|endoftext|>": 1, "a": 2}, unk_token="a"))
    backend.add_special_tokens(["<s>", "<|endoftext|>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = hf_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.prefix, tokenizer.start, tokenizer.eod) == ((0,), 0, 1)


def test_files_beside_a_sentencepiece_model_count_too(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text.txt").write_text("the end of a line\n" * 40)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert SentencePieceTokenizer(tmp_path / "tokenizer.model").ends == (2, 7)
