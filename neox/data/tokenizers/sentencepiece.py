"""SentencePiece models (Llama 2, Mistral, T5, ...)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neox.data.packages import optional_package
from neox.data.tokenizers.base import END_OF_DOCUMENT, PADDING, require_file
from neox.data.tokenizers.special_tokens import tokens_beside
from neox.errors import DataError


class SentencePieceTokenizer:
    """A SentencePiece `.model` file (SPMTokenizer).

    The end of a document is the piece <|endoftext|> where the model has it, else the model's own end of
    sentence. (Looking up an absent piece gives <unk>, which upstream then takes for the end of a document.)

    Args:
        vocab_file: path of the `.model` file.

    Raises:
        DataError: no such file, not a model, or no token that could end a document.
    """

    name = "SPMTokenizer"
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    special: frozenset[int] = frozenset()  # the model gives control pieces no text

    def __init__(self, vocab_file: str | Path | None) -> None:
        path = require_file(vocab_file, key="vocab_file", tokenizer_type=self.name)
        self._model = _load(path)
        self.vocab_size = self._model.vocab_size()
        eod = self._piece(END_OF_DOCUMENT, otherwise=self._model.eos_id())
        if eod < 0:
            raise DataError(f"{path}: has neither a piece {END_OF_DOCUMENT} nor an end-of-sentence token")
        self.eod = self.start = eod
        pad = self._piece(PADDING, otherwise=self._model.pad_id())
        self.pad = pad if pad >= 0 else eod
        own_end = (self._model.eos_id(),) if self._model.eos_id() >= 0 else ()
        self.ends = tuple(dict.fromkeys((eod, *own_end, *tokens_beside(path, self._id).ends)))

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, without begin- and end-of-sentence tokens."""
        return self._model.encode(text)

    tokenize_bare = tokenize

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, computed by several threads."""
        return self._model.encode(list(texts))

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; tokens of the padded vocabulary give nothing."""
        return self._model.decode([int(token) for token in ids if token < self.vocab_size])

    def _id(self, piece: str) -> int | None:
        token: int = self._model.piece_to_id(piece)
        return None if token == self._model.unk_id() else token

    def _piece(self, piece: str, *, otherwise: int) -> int:
        token = self._id(piece)
        return otherwise if token is None else token


def _load(path: Path) -> Any:
    package = optional_package("sentencepiece", needed_by="SPMTokenizer")
    try:
        return package.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a SentencePiece model") from error
