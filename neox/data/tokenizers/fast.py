"""Tokenizers of the `tokenizers` library: one JSON file, or GPT-2's vocabulary and merges."""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from neox.data.tokenizers.base import END_OF_DOCUMENT, PADDING, require_file
from neox.errors import DataError

# What else vocabularies call the end of a document, most specific first.
OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|end|>")


class FastTokenizer:
    """A `tokenizers.Tokenizer` with its end-of-document and padding tokens found by name.

    Args:
        name: the tokenizer_type.
        backend: the tokenizer; its truncation and padding are switched off.
        path: the file it came from, for messages.

    Raises:
        DataError: it has no end-of-document token.
    """

    def __init__(self, name: str, backend: tokenizers.Tokenizer, path: Path) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.name = name
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)
        self.eod = _end_of_document(backend, path)
        pad = backend.token_to_id(PADDING)
        self.pad = self.eod if pad is None else pad

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens spelled out in it are taken as such."""
        return self._backend.encode(text).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, computed on all cores unless TOKENIZERS_PARALLELISM is false."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones spelled out; padding of the vocabulary gives nothing."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)


def _end_of_document(backend: tokenizers.Tokenizer, path: Path) -> int:
    for candidate in (END_OF_DOCUMENT, *OTHER_ENDS):
        token = backend.token_to_id(candidate)
        if token is not None:
            return token
    special = [added.content for added in backend.get_added_tokens_decoder().values() if added.special]
    raise DataError(
        f"{path}: has no {END_OF_DOCUMENT} nor another end-of-document token; "
        f"its special tokens are {', '.join(special[:8]) or '(none)'}; add {END_OF_DOCUMENT} to added_tokens"
    )


def hf_tokenizer(vocab_file: str | Path | None) -> FastTokenizer:
    """Return the tokenizer of one JSON file in the format of the `tokenizers` library (HFTokenizer)."""
    path = require_file(vocab_file, key="vocab_file", tokenizer_type="HFTokenizer")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: not a tokenizers JSON file ({_one_line(error)})") from error
    return FastTokenizer("HFTokenizer", backend, path)


def gpt2_tokenizer(vocab_file: str | Path | None, merge_file: str | Path | None) -> FastTokenizer:
    """Return GPT-2's byte-level BPE from its vocab.json and merges.txt (GPT2BPETokenizer)."""
    name = "GPT2BPETokenizer"
    vocab_path = require_file(vocab_file, key="vocab_file", tokenizer_type=name)
    merge_path = require_file(merge_file, key="merge_file", tokenizer_type=name)
    try:
        vocabulary = json.loads(vocab_path.read_text(encoding="utf-8"))
        model = models.BPE.from_file(str(vocab_path), str(merge_path))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{vocab_path}, {merge_path}: not a GPT-2 vocabulary ({_one_line(error)})") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token in (END_OF_DOCUMENT, PADDING) if token in vocabulary])
    return FastTokenizer(name, backend, vocab_path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
