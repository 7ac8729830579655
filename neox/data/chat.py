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

from neox.data.completions import LARGEST_REWARD
from neox.data.documents import Document, document_record, read_documents, require_distinct
from neox.data.gpt_dataset import IGNORED_LABEL
from neox.data.indexed_writer import IndexedDatasetWriter, IndexedDatasetWriters
from neox.data.packages import optional_package
from neox.data.text_files import SurrogateFilter
from neox.errors import DataError

PROMPT_KEY = "prompt"
"""Field of a line with what comes before its conversations: turns, or the text of a question (TRL's formats)."""


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
        ftfy: fix broken Unicode first (needs ftfy).
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
    """A conversation as tokens, and its labels: the token, or -100 where it is not learnt.

    Attributes:
        unasked: whether its first turn is learnt, which nothing asks for.
    """

    tokens: list[int]
    labels: list[int]
    unasked: bool = False


@dataclass
class ChatSummary:
    """What was written of one key.

    Attributes:
        conversations: how many.
        labelled: tokens that have a label, in all.
        unlabelled: conversations without such a token.
        unasked: conversations whose first turn is learnt, which nothing asks for.
    """

    conversations: int = 0
    labelled: int = 0
    unlabelled: int = 0
    unasked: int = 0

    def count(self, conversation: Labelled) -> None:
        """Add a conversation."""
        labelled = sum(label != IGNORED_LABEL for label in conversation.labels)
        self.conversations += 1
        self.labelled += labelled
        self.unlabelled += not labelled
        self.unasked += conversation.unasked

    def warnings(self) -> list[str]:
        """Lines on conversations that teach nothing, or something else than answers."""
        lines = []
        if self.unlabelled:
            lines.append(
                f"{self.unlabelled:,} of {self.conversations:,} conversations have no labelled token and teach "
                "nothing; is --generation-role the role of the answers?"
            )
        if self.unasked:
            lines.append(
                f"{self.unasked:,} of {self.conversations:,} conversations begin with a labelled turn, an answer to "
                "nothing; is the question in another field?"
            )
        return lines


def preprocess_chat(options: ChatOptions, clean: SurrogateFilter | None = None) -> dict[str, ChatSummary]:
    """Write the conversations of every line, for each key.

    Args:
        options: what to tokenize and what to label.
        clean: counts the lines with lone surrogates, for which U+FFFD stands.

    Returns:
        What was written, by prefix of the documents.

    Raises:
        DataError: a missing or malformed input, or a tokenizer that cannot lay out a chat; nothing is left behind.
    """
    require_distinct(options.jsonl_keys)
    clean = clean or SurrogateFilter()
    tokenizer = _tokenizer(options.tokenizer_path)
    mend = optional_package("ftfy", needed_by="--ftfy").fix_text if options.ftfy else str
    prefixes = {key: f"{options.output_prefix}_{key}" for key in options.jsonl_keys}
    written, summaries = 0, {key: ChatSummary() for key in prefixes}
    with ExitStack() as stack:
        writers = stack.enter_context(IndexedDatasetWriters())
        outputs = {key: _Outputs(prefix, options, writers) for key, prefix in prefixes.items()}
        lines = islice(read_documents(options.inputs), options.num_docs)
        bar = tqdm(lines, unit=" docs", miniters=options.log_interval, disable=not options.progress)
        for document in stack.enter_context(bar):
            record = document_record(document, clean)
            reward = None if options.reward_key is None else _reward(document, record, options)
            written += 1
            for key, output in outputs.items():
                chat = _conversation(document, record, key, options.generation_role, mend)
                found = _build(document, chat, tokenizer, options)
                output.add(found, reward)
                summaries[key].count(found)
        if not written:
            raise DataError(f"{', '.join(map(str, options.inputs))}: no conversation; nothing to write")
    return {f"{prefixes[key]}_document": summary for key, summary in summaries.items()}


class _Outputs:
    """The files of one key."""

    def __init__(self, prefix: str, options: ChatOptions, writers: IndexedDatasetWriters) -> None:
        def writer(kind: str, dtype: type) -> IndexedDatasetWriter:
            return writers.open(f"{prefix}{kind}_document", dtype)

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
    if not tokenizer.vocab_size:  # transformers 5 makes an empty one where the files are missing
        raise DataError(f"--tokenizer-path {path}: its vocabulary is missing or empty; copy the whole folder")
    if not tokenizer.chat_template:
        raise DataError(f"--tokenizer-path {path}: has no chat template; use the tokenizer of a chat model")
    if tokenizer.eos_token_id is None:
        raise DataError(f"--tokenizer-path {path}: has no end-of-sequence token, which ends every conversation")
    return tokenizer


def _conversation(
    document: Document, record: dict[str, Any], key: str, generation_role: str, mend: Callable[[str], str]
) -> list[dict[str, str]]:
    chat = record.get(key)
    if not _is_conversation(chat):
        missing = f"is missing; the line has {', '.join(record) or 'no keys'}"
        found = "is not a conversation" if key in record else missing
        raise DataError(f'{document.path}:{document.line}: key \'{key}\' {found}; expected [{{"role", "content"}}...]')
    assert isinstance(chat, list)
    asked = [] if key == PROMPT_KEY else _asked_before(chat, record.get(PROMPT_KEY), generation_role)
    return [turn | {"content": mend(turn["content"])} for turn in (*asked, *chat)]


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        )
    )


def _asked_before(chat: list[dict[str, str]], prompt: Any, generation_role: str) -> list[dict[str, str]]:
    """Turns of a line's `prompt` that its conversation does not begin with."""
    if isinstance(prompt, str) and prompt and chat[0]["role"] == generation_role != "user":
        return [{"role": "user", "content": prompt}]
    if not _is_conversation(prompt):
        return []
    shared = next(count for count in range(len(prompt), -1, -1) if prompt[len(prompt) - count :] == chat[:count])
    asked: list[dict[str, str]] = prompt[: len(prompt) - shared]
    return asked


def _reward(document: Document, record: dict[str, Any], options: ChatOptions) -> float:
    value = record.get(str(options.reward_key))
    if not isinstance(value, bool | int | float) or not abs(value) <= LARGEST_REWARD:
        raise DataError(
            f"{document.path}:{document.line}: key '{options.reward_key}' is not a reward; expected a finite number"
        )
    return float(value) if not options.binary_reward else 1.0 if value > 0 else -1.0


def _build(document: Document, chat: list[dict[str, str]], tokenizer: Any, options: ChatOptions) -> Labelled:
    if options.no_mask or options.for_rm:
        tokens = _ended(tokenizer, _lay_out(document, chat, tokenizer))
        if options.no_mask:
            return Labelled(tokens, tokens)
        # The reward is read where the second end is predicted, that is after the first.
        end = tokenizer.eos_token_id
        return Labelled([*tokens, end], [IGNORED_LABEL] * len(tokens) + [end])
    tokens, labels, unasked = [], [], False
    for number, stretch in enumerate(_turns(document, chat, tokenizer, options.generation_role)):
        is_last = number == len(chat) - 1
        turn = _ended(tokenizer, stretch) if is_last else stretch
        tokens += turn
        if chat[number]["role"] == options.generation_role and (is_last or not options.only_last):
            unasked = unasked or number == 0
            before = _put_before(document, chat[0], tokenizer) if number == 0 else 0
            end = _end_of_turn(tokenizer, turn) or len(turn)
            labels += [IGNORED_LABEL] * before + turn[before:end]
        labels += [IGNORED_LABEL] * (len(tokens) - len(labels))
    return Labelled(tokens, labels, unasked)


def _ended(tokenizer: Any, tokens: list[int]) -> list[int]:
    """Tokens up to the end that the chat template gave them, or with one if it gave none."""
    end = _end_of_turn(tokenizer, tokens)
    return [*tokens, tokenizer.eos_token_id] if end is None else tokens[:end]


def _end_of_turn(tokenizer: Any, tokens: list[int]) -> int | None:
    """Number of tokens up to the last end-of-sequence, None unless nothing but blanks follows it.

    Many templates break the line after it. Nothing is generated beyond the end, so that is not learnt.
    """
    end = next((n for n in range(len(tokens), 0, -1) if tokens[n - 1] == tokenizer.eos_token_id), None)
    return None if end is None or tokenizer.decode(tokens[end:]).strip() else end


def _put_before(document: Document, turn: dict[str, str], tokenizer: Any) -> int:
    """Number of tokens before the content of a conversation's first turn: a default system prompt say, and a header.

    What is put before a whole conversation is what the turn does not have where it comes second, and the header is what
    announces an answer.

    Raises:
        DataError: the template lays it out in another way there, or refuses it.
    """
    try:
        first = _lay_out(document, [turn], tokenizer)
        both = _lay_out(document, [turn, turn], tokenizer)
        header = _lay_out(document, [turn], tokenizer, announce=True)[len(first) :]
    except DataError:
        first = both = header = []
    second = both[len(first) :]
    if not second or [*first, *second] != both or first[-len(second) :] != second:
        raise DataError(
            f"{document.path}:{document.line}: begins with a turn that is labelled ({turn['role']}), and the chat "
            "template does not show which tokens are its own; begin with what is asked, or leave the line out"
        )
    return len(first) - len(second) + (len(header) if second[: len(header)] == header else 0)


def _turns(document: Document, chat: list[dict[str, str]], tokenizer: Any, generation_role: str) -> Iterator[list[int]]:
    """What each turn adds to the tokens of those before; what announces an answer belongs to the turn before it.

    Raises:
        DataError: the template lays out a beginning of the conversation in another way than the whole.
    """
    before: list[int] = []
    for number in range(len(chat)):
        answered = number + 1 < len(chat) and chat[number + 1]["role"] == generation_role
        tokens = _lay_out(document, chat[: number + 1], tokenizer, announce=answered)
        if tokens[: len(before)] != before:
            raise DataError(
                f"{document.path}:{document.line}: the chat template changes earlier turns when turn {number + 1} is "
                "added, so turns cannot be told apart; use --no-mask, or another template"
            )
        yield tokens[len(before) :]
        before = tokens


def _lay_out(document: Document, chat: list[dict[str, str]], tokenizer: Any, *, announce: bool = False) -> list[int]:
    """Tokens of a conversation.

    Raises:
        DataError: the template refuses it.
    """
    package = optional_package("jinja2", needed_by="a chat template")
    try:
        tokens: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=announce, return_dict=False)
    except package.TemplateError as error:
        raise DataError(
            f"{document.path}:{document.line}: the chat template refuses the conversation "
            f"({' '.join(str(error).split())}); correct the line"
        ) from None
    return tokens
