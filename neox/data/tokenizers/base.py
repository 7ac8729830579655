"""What every tokenizer offers, and the size to which a vocabulary is padded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from neox.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"


class Tokenizer(Protocol):
    """Text to token numbers and back.

    Attributes:
        name: the tokenizer_type of the configuration.
        vocab_size: tokens, special ones included, before padding.
        eod: token that ends a document.
        pad: token that fills up batches; the end-of-document token where the vocabulary has none of its own.
    """

    name: str
    vocab_size: int
    eod: int
    pad: int

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        ...

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, by the fastest means the tokenizer has."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        ...


def padded_vocab_size(vocab_size: int, *, divisible_by: int, model_parallel_size: int) -> int:
    """Return the smallest multiple of divisible_by * model_parallel_size that holds the vocabulary."""
    multiple = divisible_by * model_parallel_size
    return -(-vocab_size // multiple) * multiple


def require_file(path: str | Path | None, *, key: str, tokenizer_type: str) -> Path:
    """Return the path of a tokenizer's file.

    Raises:
        DataError: none is given, or it does not exist.
    """
    if not path:
        raise DataError(f"{tokenizer_type} needs a file: set {key}")
    if not Path(path).is_file():
        raise DataError(f"{key}: {path}: no such file; {tokenizer_type} reads its vocabulary there")
    return Path(path)
