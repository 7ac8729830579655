"""Tokenizers that need packages which are not installed by default."""

from collections.abc import Sequence
from pathlib import Path

from neox.data.packages import optional_package
from neox.data.tokenizers.base import PADDING
from neox.errors import DataError


class HFGPT2Tokenizer:
    """GPT-2's tokenizer through transformers, by the name of a model or a folder, with <|padding|> added."""

    name = "HFGPT2Tokenizer"
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __init__(self, vocab_file: str | None) -> None:
        package = optional_package("transformers", needed_by=self.name)
        source = vocab_file or "gpt2"
        # Without a network, asking the Hub takes minutes: it is not asked for a path.
        is_path = Path(source).exists() or ("/" in source and Path(source).parent.is_dir())
        absent = (
            f"vocab_file: {source}: neither a folder with a GPT-2 tokenizer (tokenizer.json, or vocab.json and "
            "merges.txt) nor the name of a model that can be downloaded"
        )
        try:
            self._backend = package.GPT2TokenizerFast.from_pretrained(source, local_files_only=is_path)
        except (OSError, ValueError) as error:
            raise DataError(absent) from error
        if not self._backend.vocab_size:  # transformers 5 makes an empty one where the files are missing
            raise DataError(absent)
        self._backend.add_special_tokens({"pad_token": PADDING})
        self.vocab_size = max(self._backend.get_vocab().values()) + 1  # ids may have gaps
        self.eod: int = self._backend.eos_token_id
        self.start = self.eod
        self.ends: tuple[int, ...] = (self.eod,)
        self.special = frozenset(self._backend.all_special_ids)
        self.pad: int = self._backend.pad_token_id

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return self._backend.encode(text)

    tokenize_bare = tokenize

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text."""
        return self._backend(list(texts))["input_ids"] if texts else []

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._backend.decode([int(token) for token in ids if token < self.vocab_size])


class TiktokenTokenizer:
    """An encoding of tiktoken, by its name (vocab_file: cl100k_base). It has no padding token of its own."""

    name = "TiktokenTokenizer"
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def __init__(self, vocab_file: str | None) -> None:
        package = optional_package("tiktoken", needed_by=self.name)
        name = vocab_file or "cl100k_base"
        known = package.list_encoding_names()
        if name not in known:
            raise DataError(f"vocab_file: {name}: no such tiktoken encoding; there are {', '.join(known)}")
        try:
            self._backend = package.get_encoding(name)
        except (OSError, ValueError) as error:  # of the network or of the cache, or a download that was damaged
            raise DataError(
                f"vocab_file: {name}: its file cannot be downloaded here; set TIKTOKEN_CACHE_DIR to a folder where "
                "tiktoken has cached it on a machine with a network"
            ) from error
        self.vocab_size: int = self._backend.n_vocab
        self.eod: int = self._backend.eot_token
        self.start = self.pad = self.eod
        self.ends: tuple[int, ...] = (self.eod,)
        self.special = frozenset(map(self._backend.encode_single_token, self._backend.special_tokens_set))

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens spelled out in it are taken as such."""
        return self._backend.encode(text, allowed_special="all")

    tokenize_bare = tokenize

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, computed by several threads."""
        return self._backend.encode_batch(list(texts), allowed_special="all")

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._backend.decode([int(token) for token in ids if token < self.vocab_size])
