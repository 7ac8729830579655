"""Tokenizers that need packages which are not installed by default."""

from collections.abc import Sequence

from neox.data.packages import optional_package
from neox.data.tokenizers.base import PADDING
from neox.errors import DataError


class HFGPT2Tokenizer:
    """GPT-2's tokenizer through transformers, by the name of a model or a folder, with <|padding|> added."""

    name = "HFGPT2Tokenizer"

    def __init__(self, vocab_file: str | None) -> None:
        package = optional_package("transformers", needed_by=self.name)
        source = vocab_file or "gpt2"
        try:
            self._backend = package.GPT2TokenizerFast.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise DataError(
                f"vocab_file: {source}: neither a folder with a GPT-2 tokenizer nor a model name"
            ) from error
        self._backend.add_special_tokens({"pad_token": PADDING})
        self.vocab_size = len(self._backend)
        self.eod: int = self._backend.eos_token_id
        self.pad: int = self._backend.pad_token_id

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return self._backend.encode(text)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text."""
        return self._backend(list(texts))["input_ids"] if texts else []

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._backend.decode([int(token) for token in ids if token < self.vocab_size])


class TiktokenTokenizer:
    """An encoding of tiktoken, by its name (vocab_file: cl100k_base). It has no padding token of its own."""

    name = "TiktokenTokenizer"

    def __init__(self, vocab_file: str | None) -> None:
        package = optional_package("tiktoken", needed_by=self.name)
        try:
            self._backend = package.get_encoding(vocab_file or "cl100k_base")
        except ValueError as error:
            known = ", ".join(package.list_encoding_names())
            raise DataError(f"vocab_file: {vocab_file}: no such tiktoken encoding; there are {known}") from error
        self.vocab_size: int = self._backend.n_vocab
        self.eod: int = self._backend.eot_token
        self.pad: int = self._backend.eot_token

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens spelled out in it are taken as such."""
        return self._backend.encode(text, allowed_special="all")

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, computed by several threads."""
        return self._backend.encode_batch(list(texts), allowed_special="all")

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._backend.decode([int(token) for token in ids if token < self.vocab_size])
