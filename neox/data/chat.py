"""Conversations to documents with labels and rewards, for fine-tuning and for training on preferences.

A conversation is a list of {"role", "content"}; the chat template of a Hugging Face tokenizer lays it out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from neox.data.documents import Document, document_record, read_documents
from neox.data.gpt_dataset import IGNORED_LABEL
from neox.data.indexed_writer import IndexedDatasetWriter
from neox.data.packages import optional_package
from neox.errors import DataError


@dataclass(frozen=True)
class ChatOptions:
    """What to tokenize and what to label.

    Attributes:
        inputs: files or folders, see `neox.data.documents.read_documents`.
        output_prefix: each key goes to `<output_prefix>_<key>_document`, its labels to
            `<output_prefix>_<key>_label_document`, rewards to `<output_prefix>_<key>_reward_document`.
        tokenizer_path: folder or name of a Hugging Face tokenizer with a chat template.
        jsonl_keys: fields that hold conversations.
        no_mask: label every token.
        for_rm: label the end of the conversation only, where a reward model is read.
        generation_role: whose turns are labelled.
        only_last: label the last turn only.
        reward_key: field that holds the reward of the line; None for none.
        binary_reward: store 1 for a reward that is true or above 0, else -1.
        ftfy: mend broken Unicode first (needs ftfy).
        num_docs: stop after so many lines; None for all.
        log_interval: lines between updates of the progress bar.
        progress: show the progress bar.
    """

    inputs: Sequence[str | Path]
    output_prefix: str
    tokenizer_path: str
    jsonl_keys: Sequence[str] = field(default=("conversation",))
    no_mask: bool = False
    for_rm: bool = False
    generation_role: str = "assistant"
    only_last: bool = False
    reward_key: str | None = None
    binary_reward: bool = False
    ftfy: bool = False
    num_docs: int | None = None
    log_interval: int = 1000
    progress: bool = True


class Labelled(NamedTuple):
    """A conversation as tokens, and its labels: the token, or -100 where it is not learnt."""

    tokens: list[int]
    labels: list[int]


def preprocess_chat(options: ChatOptions) -> dict[str, int]:
    """Write the conversations of every line, for each key.

    Returns:
        Tokens that are labelled, by prefix of the documents.

    Raises:
        DataError: a missing or malformed input, or a tokenizer that cannot lay out a chat; nothing is left behind.
    """
    tokenizer = _tokenizer(options.tokenizer_path)
    mend = optional_package("ftfy", needed_by="--ftfy").fix_text if options.ftfy else str
    prefixes = {key: f"{options.output_prefix}_{key}" for key in options.jsonl_keys}
    written, labelled = 0, dict.fromkeys((f"{prefix}_document" for prefix in prefixes.values()), 0)
    with ExitStack() as stack:
        outputs = {key: _Outputs(prefix, options, stack) for key, prefix in prefixes.items()}
        lines = islice(read_documents(options.inputs), options.num_docs)
        bar = tqdm(lines, unit=" docs", miniters=options.log_interval, disable=not options.progress)
        for document in stack.enter_context(bar):
            record = document_record(document)
            reward = None if options.reward_key is None else _reward(document, record, options)
            written += 1
            for key, output in outputs.items():
                chat = _conversation(document, record, key, mend)
                found = _build(document, chat, tokenizer, options)
                output.add(found, reward)
                labelled[f"{prefixes[key]}_document"] += sum(label != IGNORED_LABEL for label in found.labels)
        if not written:
            raise DataError(f"{', '.join(map(str, options.inputs))}: no conversation; nothing to write")
    return labelled


class _Outputs:
    """The files of one key."""

    def __init__(self, prefix: str, options: ChatOptions, stack: ExitStack) -> None:
        def writer(kind: str, dtype: type) -> IndexedDatasetWriter:
            return stack.enter_context(IndexedDatasetWriter(f"{prefix}{kind}_document", dtype))

        self.tokens, self.labels = writer("", np.int32), writer("_label", np.int32)
        self.rewards = writer("_reward", np.float32) if options.reward_key is not None else None

    def add(self, conversation: Labelled, reward: float | None) -> None:
        self.tokens.add_document(conversation.tokens)
        self.labels.add_document(conversation.labels)
        if self.rewards is not None:
            self.rewards.add_document(np.array([reward], np.float32))


def _tokenizer(path: str) -> Any:
    package = optional_package("transformers", needed_by="a chat template")
    try:
        tokenizer = package.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer-path {path}: neither a folder with a tokenizer nor a model name") from error
    if not tokenizer.chat_template:
        raise DataError(f"--tokenizer-path {path}: has no chat template; use the tokenizer of a chat model")
    if tokenizer.eos_token_id is None:
        raise DataError(f"--tokenizer-path {path}: has no end-of-sequence token, which ends every conversation")
    return tokenizer


def _conversation(
    document: Document, record: dict[str, Any], key: str, mend: Callable[[str], str]
) -> list[dict[str, str]]:
    chat = record.get(key)
    texts = isinstance(chat, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in chat
    )
    if not texts or not chat:
        missing = f"is missing; the line has {', '.join(record) or 'no keys'}"
        found = "is no conversation" if key in record else missing
        raise DataError(f'{document.path}:{document.line}: key \'{key}\' {found}; expected [{{"role", "content"}}...]')
    return [turn | {"content": mend(turn["content"])} for turn in chat]


def _reward(document: Document, record: dict[str, Any], options: ChatOptions) -> float:
    value = record.get(str(options.reward_key))
    if not isinstance(value, bool | int | float):
        raise DataError(f"{document.path}:{document.line}: key '{options.reward_key}' is no reward; expected a number")
    return float(value) if not options.binary_reward else 1.0 if value > 0 else -1.0


def _build(document: Document, chat: list[dict[str, str]], tokenizer: Any, options: ChatOptions) -> Labelled:
    end = tokenizer.eos_token_id
    if options.no_mask or options.for_rm:
        tokens = [*_lay_out(tokenizer, chat), end]
        if options.no_mask:
            return Labelled(tokens, tokens)
        # The reward is read where the second end is predicted, that is after the first.
        return Labelled([*tokens, end], [IGNORED_LABEL] * len(tokens) + [end])
    tokens, labels = [], []
    for number, stretch in enumerate(_turns(document, chat, tokenizer, options.generation_role)):
        is_last = number == len(chat) - 1
        learnt = chat[number]["role"] == options.generation_role and (is_last or not options.only_last)
        tokens += stretch
        labels += stretch if learnt else [IGNORED_LABEL] * len(stretch)
        if is_last:
            tokens.append(end)
            labels.append(end if learnt else IGNORED_LABEL)
    return Labelled(tokens, labels)


def _turns(document: Document, chat: list[dict[str, str]], tokenizer: Any, generation_role: str) -> Iterator[list[int]]:
    """What each turn adds to the tokens of those before; what announces an answer belongs to the turn before it.

    Raises:
        DataError: the template lays out a beginning of the conversation in another way than the whole.
    """
    before: list[int] = []
    for number in range(len(chat)):
        answered = number + 1 < len(chat) and chat[number + 1]["role"] == generation_role
        tokens = _lay_out(tokenizer, chat[: number + 1], announce=answered)
        if tokens[: len(before)] != before:
            raise DataError(
                f"{document.path}:{document.line}: the chat template changes earlier turns when turn {number + 1} is "
                "added, so turns cannot be told apart; use --no-mask, or another template"
            )
        yield tokens[len(before) :]
        before = tokens


def _lay_out(tokenizer: Any, chat: list[dict[str, str]], *, announce: bool = False) -> list[int]:
    tokens: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=announce, return_dict=False)
    return tokens
