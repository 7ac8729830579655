"""Tokenizers by their names in the configuration."""

from typing import Protocol

from neox.data.tokenizers.base import Tokenizer, padded_vocab_size
from neox.data.tokenizers.characters import CharLevelTokenizer
from neox.data.tokenizers.fast import gpt2_tokenizer, hf_tokenizer
from neox.data.tokenizers.optional import HFGPT2Tokenizer, TiktokenTokenizer
from neox.data.tokenizers.sentencepiece import SentencePieceTokenizer
from neox.errors import DataError

TOKENIZER_TYPES = (
    "GPT2BPETokenizer",
    "HFTokenizer",
    "HFGPT2Tokenizer",
    "SPMTokenizer",
    "CharLevelTokenizer",
    "TiktokenTokenizer",
)


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
        DataError: unknown type, missing or unreadable file, missing package, or no end-of-document token.
    """
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


__all__ = ["TOKENIZER_TYPES", "Tokenizer", "TokenizerOptions", "build_tokenizer", "padded_vocab_size"]
