"""Tokenizers by their names in the configuration."""

from typing import Protocol

from neox.choices import TOKENIZER_TYPES
from neox.data.tokenizers.base import Tokenizer, is_empty, padded_vocab_size, prompt_tokens
from neox.data.tokenizers.characters import CharLevelTokenizer
from neox.data.tokenizers.fast import gpt2_tokenizer, hf_tokenizer
from neox.data.tokenizers.optional import HFGPT2Tokenizer, TiktokenTokenizer
from neox.data.tokenizers.sentencepiece import SentencePieceTokenizer
from neox.errors import DataError


class TokenizerOptions(Protocol):
    """The part of the configuration that names a tokenizer."""

    @property
    def tokenizer_type(self) -> str:
        """One of TOKENIZER_TYPES."""
        ...

    @property
    def vocab_file(self) -> str | None:
        """Vocabulary or model file; for some types a name."""
        ...

    @property
    def merge_file(self) -> str | None:
        """Merges, for GPT2BPETokenizer."""
        ...


def build_tokenizer(options: TokenizerOptions) -> Tokenizer:
    """Return the tokenizer that the options name.

    Raises:
        DataError: unknown type, missing, unreadable or empty file, missing package, or a malformed file beside it.
    """
    tokenizer = _build(options)
    if is_empty(tokenizer):
        raise DataError(
            f"vocab_file: {options.vocab_file}: has no tokens except special ones, so every text would become "
            "empty; check the file"
        )
    return tokenizer


def _build(options: TokenizerOptions) -> Tokenizer:
    match options.tokenizer_type:
        case "GPT2BPETokenizer":
            return gpt2_tokenizer(options.vocab_file, options.merge_file)
        case "HFTokenizer":
            return hf_tokenizer(options.vocab_file)
        case "HFGPT2Tokenizer":
            return HFGPT2Tokenizer(options.vocab_file)
        case "SPMTokenizer":
            return SentencePieceTokenizer(options.vocab_file)
        case "CharLevelTokenizer":
            return CharLevelTokenizer()
        case "TiktokenTokenizer":
            return TiktokenTokenizer(options.vocab_file)
    raise DataError(f"tokenizer_type: '{options.tokenizer_type}' is unknown; use {', '.join(TOKENIZER_TYPES)}")


__all__ = ["TOKENIZER_TYPES", "Tokenizer", "TokenizerOptions", "build_tokenizer", "padded_vocab_size", "prompt_tokens"]
