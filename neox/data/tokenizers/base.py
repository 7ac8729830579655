"""What every tokenizer offers, and the size to which a vocabulary is padded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from neox.downloads import failed_download
from neox.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"

_USUAL_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MANY_SCRIPTS = "The 3 cafés of Łódź: да, 東京 の, नमस्ते, سلام\n"


class Tokenizer(Protocol):
    """Text to token numbers and back.

    Attributes:
        name: the tokenizer_type of the configuration.
        vocab_size: tokens, special ones included, before padding.
        prefix: tokens that `tokenize` puts before a text, a beginning-of-text token say; most put none.
        suffix: tokens that it puts after a text.
        ends: tokens at which a text ends: `eod`, and what the files beside the vocabulary name.
        special: tokens that are no text: what a model says is shown without them.
    """

    name: str
    vocab_size: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    ends: tuple[int, ...]
    special: frozenset[int]

    @property
    def eod(self) -> int:
        """Token that ends a document.

        Raises:
            DataError: the vocabulary has none.
        """
        ...

    @property
    def pad(self) -> int:
        """Token that fills up batches; the end-of-document token where the vocabulary has none of its own."""
        ...

    @property
    def start(self) -> int:
        """Token that stands for an empty context: what begins a text, else what ends one."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that the tokenizer puts around it."""
        ...

    def tokenize_bare(self, text: str) -> list[int]:
        """Return the tokens of a text and no others: of what continues another text."""
        ...

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, by the fastest means the tokenizer has."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        ...


def prompt_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text that is to be continued: the prefix once, also where the text spells it out, and no end."""
    tokens, prefix = tokenizer.tokenize_bare(text), list(tokenizer.prefix)
    return tokens if tokens[: len(prefix)] == prefix else prefix + tokens


def padded_vocab_size(vocab_size: int, *, divisible_by: int, model_parallel_size: int) -> int:
    """Return the smallest multiple of divisible_by * model_parallel_size that holds the vocabulary."""
    multiple = divisible_by * model_parallel_size
    return -(-vocab_size // multiple) * multiple


def require_file(path: str | Path | None, *, key: str, tokenizer_type: str) -> Path:
    """Return the path of a tokenizer's file.

    Raises:
        DataError: none is given, or it does not exist, or was not downloaded.
    """
    if not path:
        raise DataError(f"{tokenizer_type} needs a file: set {key}")
    if Path(path).is_dir():
        inside = next((Path(path) / name for name in _USUAL_NAMES if (Path(path) / name).is_file()), None)
        raise DataError(f"{key}: {path}: is a folder; give {inside or f'the file in it that {tokenizer_type} reads'}")
    if not Path(path).is_file():
        raise DataError(f"{key}: {path}: no such file; {tokenizer_type} reads its vocabulary there")
    found = failed_download(Path(path))
    if found:
        raise DataError(f"{key}: {path}: {found}")
    return Path(path)


def is_empty(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer turns every text into nothing, as one with no vocabulary but special tokens does."""
    some = [token for token in range(min(tokenizer.vocab_size, 512)) if token not in tokenizer.special]
    try:
        return not any(map(tokenizer.tokenize_bare, (MANY_SCRIPTS, tokenizer.detokenize(some))))
    except Exception:  # libraries raise whatever they like for a character without a token
        return False
