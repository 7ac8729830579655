"""Conversations to documents, labels and rewards."""

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts_of import run_script
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neox.data import IndexedDataset
from neox.data.chat import ChatOptions, preprocess_chat
from neox.data.text_files import replaced_line
from neox.errors import DataError

ROOT = Path(__file__).parents[2]
WORDS = ["<end>", "user", "assistant", ":", "one", "two", "three", "four", "[unk]"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A tokenizer of a few words."""
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="[unk]")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def written(folder: Path, tokenizer: Path, *lines: Any, **changes: Any) -> Path:
    """Preprocess lines; return the prefix."""
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"output_prefix": str(folder / "out"), "tokenizer_path": str(tokenizer), "progress": False} | changes
    preprocess_chat(ChatOptions(inputs=[folder / "in.jsonl"], **options))
    return folder / "out"


def words(row: np.ndarray) -> str:
    return " ".join("-" if token < 0 else WORDS[token] for token in row)


WHOLE = "user : one assistant : two two user : three assistant : four <end>"


@pytest.mark.parametrize(
    ("changes", "tokens", "labels"),
    [
        ({}, WHOLE, "- - - - - two two - - - - - four <end>"),
        ({"only_last": True}, WHOLE, "- - - - - - - - - - - - four <end>"),
        ({"generation_role": "user"}, WHOLE, "user : one - - - - user : three - - - -"),
        ({"no_mask": True}, WHOLE, WHOLE),
        ({"for_rm": True}, WHOLE + " <end>", "- - - - - - - - - - - - - - <end>"),
    ],
)
def test_labels(tmp_path: Path, tokenizer: Path, changes: dict[str, Any], tokens: str, labels: str) -> None:
    if changes.get("generation_role") == "user":
        # What announces an answer is always the assistant's here, so it is left out.
        tokenizer = save_tokenizer(tmp_path / "tokenizer", TEMPLATE.partition("{% if")[0])
    prefix = written(tmp_path, tokenizer, {"conversation": CHAT}, **changes)
    assert words(IndexedDataset(f"{prefix}_conversation_document")[0]) == tokens
    assert words(IndexedDataset(f"{prefix}_conversation_label_document")[0]) == labels


@pytest.mark.parametrize(("binary", "rewards"), [(False, [0.5, -2.0, 0.0, 1.0]), (True, [1.0, -1.0, -1.0, 1.0])])
def test_pairs_and_rewards(tmp_path: Path, tokenizer: Path, binary: bool, rewards: list[float]) -> None:
    lines = [{"good": CHAT[:2], "bad": CHAT[2:], "rating": rating} for rating in (0.5, -2, 0, True)]
    changes = {"jsonl_keys": ["good", "bad"], "reward_key": "rating", "binary_reward": binary}
    prefix = written(tmp_path, tokenizer, *lines, **changes)
    for key in ("good", "bad"):
        stored = IndexedDataset(f"{prefix}_{key}_reward_document")
        assert stored.dtype == np.float32
        assert [row.tolist() for row in stored] == [[reward] for reward in rewards]
        assert len(IndexedDataset(f"{prefix}_{key}_document")) == 4
        assert IndexedDataset(f"{prefix}_{key}_label_document").dtype == np.int32


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        ({"other": 1}, {}, r"in\.jsonl:1: key 'conversation' is missing; the line has other"),
        ({"conversation": "one"}, {}, r"in\.jsonl:1: key 'conversation' is not a conversation"),
        ({"conversation": []}, {}, "is not a conversation"),
        ({"conversation": [{"role": "user"}]}, {}, "is not a conversation"),
        ({"conversation": CHAT, "r": "good"}, {"reward_key": "r"}, r"in\.jsonl:1: key 'r' is not a reward"),
        ({"conversation": CHAT, "r": float("nan")}, {"reward_key": "r"}, "key 'r' is not a reward; expected a finite"),
        ({"conversation": CHAT, "r": 10**400}, {"reward_key": "r"}, "key 'r' is not a reward; expected a finite"),
        ({"conversation": CHAT}, {"jsonl_keys": ["conversation"] * 2}, "--jsonl-keys: conversation is named twice"),
    ],
)
def test_mistakes(tmp_path: Path, tokenizer: Path, line: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        written(tmp_path, tokenizer, line, **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_templates_that_do_not_do(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match="no conversation; nothing to write"):
        written(tmp_path, tokenizer)
    bare = save_tokenizer(tmp_path / "bare", None)
    with pytest.raises(DataError, match="has no chat template; use the tokenizer of a chat model"):
        written(tmp_path, bare, {"conversation": CHAT})
    backwards = save_tokenizer(tmp_path / "backwards", "{% for m in messages|reverse %}{{ m.content }} {% endfor %}")
    with pytest.raises(DataError, match="changes earlier turns when turn 2 is added"):
        written(tmp_path, backwards, {"conversation": CHAT})
    with pytest.raises(DataError, match="neither a folder with a tokenizer nor a model name"):
        written(tmp_path, tmp_path / "nowhere", {"conversation": CHAT})


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="its vocabulary is missing or empty; copy the whole folder"):
        written(tmp_path, tmp_path / "tokenizer", {"conversation": CHAT})


def test_lone_surrogates_are_replaced_and_counted(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two \ud83d"}]
    lines = [{"conversation": CHAT}, {"conversation": half}, {"conversation": CHAT, "prompt": "\udc00"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--tokenizer-path", tokenizer]
    assert run_script("tools/datasets/preprocess_data_with_chat_template.py", *arguments) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [replaced_line(2)]
    assert words(IndexedDataset(tmp_path / "out_conversation_document")[1]) == "user : one assistant : two [unk] <end>"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--no-mask", "--for-rm"), "--no-mask and --for-rm label different tokens"),
        (("--no-mask", "--only-last"), "--no-mask and --only-last label different tokens"),
        (("--for-rm", "--only-last"), "--for-rm and --only-last label different tokens"),
        (("--binary-reward",), "--binary-reward is about the rewards of --reward-key"),
    ],
    ids=["mask", "last", "reward model", "reward"],
)
def test_flags_of_which_one_would_do_nothing(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", "in.jsonl", "--output-prefix", "out", "--tokenizer-path", "tokenizer", *flags]
    assert run_script("tools/datasets/preprocess_data_with_chat_template.py", *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"conversation": CHAT}) + "\n")
    script = runpy.run_path(str(ROOT / "tools/datasets/preprocess_data_with_chat_template.py"))
    arguments = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--tokenizer-path", tokenizer]
    script["main"]([*map(str, arguments), "--only-last", "--workers", "2"])
    assert capsys.readouterr().out == f"{tmp_path}/out_conversation_document.bin: 2 labelled tokens\n"


# As ChatML has it: a system turn where none is given, and a line break after the end of each turn.
ENDING = (
    "{% if messages[0].role != 'system' %}four [unk] <end>\n{% endif %}"
    "{% for m in messages %}{{ m.role }} : {{ m.content }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose template ends turns itself, and which has a token for a line break, as byte-level ones have."""
    folder = tmp_path_factory.mktemp("ending")
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*WORDS, "\n"])}, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="[unk]")
    tokenizer.chat_template = ENDING
    tokenizer.save_pretrained(folder)
    return folder


SYSTEM = "four [unk] <end> / "


@pytest.mark.parametrize(
    ("changes", "tokens", "labels"),
    [
        (
            {},
            "user : one <end> / assistant : two two <end> / user : three <end> / assistant : four <end>",
            "- - - - - - - two two <end> - - - - - - - - four <end>",
        ),
        (
            {"no_mask": True},
            "user : one <end> / assistant : two two <end> / user : three <end> / assistant : four <end>",
            None,
        ),
        (
            {"for_rm": True},
            "user : one <end> / assistant : two two <end> / user : three <end> / assistant : four <end> <end>",
            "- " * 20 + "<end>",
        ),
    ],
)
def test_a_conversation_ends_once(
    tmp_path: Path, ending: Path, changes: dict[str, Any], tokens: str, labels: str | None
) -> None:
    """Where the template has ended it, nothing is added, and what follows the end is not learnt."""
    prefix = written(tmp_path, ending, {"conversation": CHAT}, **changes)
    shown, taught = (
        " ".join("-" if token < 0 else [*WORDS, "/"][token] for token in IndexedDataset(f"{prefix}_{kind}document")[0])
        for kind in ("conversation_", "conversation_label_")
    )
    assert shown == SYSTEM + tokens
    assert taught == (SYSTEM + tokens if labels is None else "- - - - " + labels)


QUESTION, ANSWER = CHAT[:1], CHAT[1:2]


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": QUESTION, "chosen": ANSWER},
        {"prompt": "one", "chosen": ANSWER},
        # Whole conversations with the question beside them: it is not asked twice.
        {"prompt": QUESTION, "chosen": [*QUESTION, *ANSWER]},
        {"prompt": "one", "chosen": [*QUESTION, *ANSWER]},
        {"chosen": [*QUESTION, *ANSWER]},
        {"prompt": None, "chosen": [*QUESTION, *ANSWER]},
    ],
)
def test_a_prompt_kept_apart_is_asked_once(tmp_path: Path, tokenizer: Path, line: dict[str, Any]) -> None:
    prefix = written(tmp_path, tokenizer, line, jsonl_keys=["chosen"], only_last=True)
    assert words(IndexedDataset(f"{prefix}_chosen_document")[0]) == "user : one assistant : two two <end>"
    assert words(IndexedDataset(f"{prefix}_chosen_label_document")[0]) == "- - - - - two two <end>"


def test_a_prompt_that_ends_with_the_first_turns_is_continued(tmp_path: Path, tokenizer: Path) -> None:
    line = {"prompt": CHAT[:3], "chosen": CHAT[2:]}
    prefix = written(tmp_path, tokenizer, line, jsonl_keys=["chosen", "prompt"])
    assert words(IndexedDataset(f"{prefix}_chosen_document")[0]) == WHOLE
    asked = IndexedDataset(f"{prefix}_prompt_document")[0]
    assert words(asked) == "user : one assistant : two two user : three <end>"


def test_a_system_prompt_of_the_template_is_not_learnt(tmp_path: Path, ending: Path) -> None:
    prefix = written(tmp_path, ending, {"conversation": [*ANSWER, *QUESTION, *CHAT[3:]]})
    labels = IndexedDataset(f"{prefix}_conversation_label_document")[0]
    assert words(labels) == "- - - - - - two two <end> - - - - - - - - four <end>"


def summaries(folder: Path, tokenizer: Path, *chats: Any, **changes: Any) -> dict[str, Any]:
    (folder / "in.jsonl").write_text("".join(json.dumps({"conversation": chat}) + "\n" for chat in chats))
    options = {"output_prefix": str(folder / "out"), "tokenizer_path": str(tokenizer), "progress": False} | changes
    (summary,) = preprocess_chat(ChatOptions(inputs=[folder / "in.jsonl"], **options)).values()
    return vars(summary)


def test_conversations_that_teach_nothing_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    counts = summaries(tmp_path, tokenizer, CHAT, QUESTION, ANSWER, CHAT[:3])
    assert counts == {"conversations": 4, "labelled": 4 + 3 + 2, "unlabelled": 1, "unasked": 1}
    none = summaries(tmp_path, tokenizer, CHAT, QUESTION, generation_role="model")
    assert none == {"conversations": 2, "labelled": 0, "unlabelled": 2, "unasked": 0}
    for kind in ({"no_mask": True}, {"for_rm": True}):
        found = summaries(tmp_path, tokenizer, CHAT, QUESTION, ANSWER, **kind)
        assert (found["unlabelled"], found["unasked"]) == (0, 0)


def test_the_command_says_what_teaches_nothing(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"conversation": chat}) + "\n" for chat in (CHAT, QUESTION, ANSWER)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    script = runpy.run_path(str(ROOT / "tools/datasets/preprocess_data_with_chat_template.py"))
    arguments = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--tokenizer-path", tokenizer]
    script["main"]([*map(str, arguments)])
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path}/out_conversation_document.bin: 7 labelled tokens\n"
    place = f"{tmp_path}/out_conversation_document: "
    assert f"{place}1 of 3 conversations have no labelled token" in shown.err
    assert f"{place}1 of 3 conversations begin with a labelled turn" in shown.err


def test_a_template_that_refuses_a_conversation_names_its_line(tmp_path: Path) -> None:
    strict = (
        "{% if messages|length > 1 and messages[0].role == messages[1].role %}"
        "{{ raise_exception('alternate') }}{% endif %}"
    )
    folder = save_tokenizer(tmp_path / "strict", strict + TEMPLATE)
    with pytest.raises(DataError, match=r"in\.jsonl:2: the chat template refuses the conversation \(alternate\)"):
        written(tmp_path, folder, {"conversation": CHAT}, {"conversation": [*QUESTION, *QUESTION]})
    with pytest.raises(DataError, match=r"in\.jsonl:1: begins with a turn that is labelled \(assistant\)"):
        written(tmp_path, folder, {"conversation": ANSWER})
