"""Tokenizers of the `tokenizers` library: one JSON file, or GPT-2's vocabulary and merges."""

import json
from collections.abc import Sequence
from itertools import takewhile
from operator import itemgetter
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from neox.data.tokenizers.base import END_OF_DOCUMENT, MANY_SCRIPTS, PADDING, require_file
from neox.data.tokenizers.special_tokens import tokens_beside
from neox.errors import DataError

# What else vocabularies call the end of a document, most specific first.
OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|end|>")


class FastTokenizer:
    """A `tokenizers.Tokenizer` with its end-of-document and padding tokens found by name.

    A vocabulary without an end of documents serves where nothing asks for one.

    Args:
        name: the tokenizer_type.
        backend: the tokenizer; its truncation and padding are switched off.
        path: the file it came from.

    Raises:
        DataError: a file beside it that names special tokens is malformed.
    """

    def __init__(self, name: str, backend: tokenizers.Tokenizer, path: Path) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.name = name
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(len(vocabulary), max(vocabulary.values(), default=-1) + 1)
        self._path = path
        self._named = tokens_beside(path, backend.token_to_id)
        by_name = (backend.token_to_id(candidate) for candidate in (END_OF_DOCUMENT, *OTHER_ENDS))
        self._eod = next((token for token in by_name if token is not None), self._named.eos)
        self.prefix, self.suffix = _put_around(backend)
        self.ends = tuple(dict.fromkeys((*self._named.ends, *(() if self._eod is None else (self._eod,)))))
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(number for number, token in added.items() if token.special)

    @property
    def eod(self) -> int:
        """Token that ends a document: by the names that vocabularies give it, else the eos_token of the files beside.

        Raises:
            DataError: there is none.
        """
        if self._eod is not None:
            return self._eod
        special = [str(self._backend.id_to_token(token)) for token in sorted(self.special)]
        raise DataError(
            f"{self._path}: has no {END_OF_DOCUMENT} nor another end-of-document token; "
            f"its special tokens are {', '.join(special[:8]) or '(none)'}; add {END_OF_DOCUMENT} to added_tokens"
        )

    @property
    def pad(self) -> int:
        """Token that fills up batches."""
        pad = self._backend.token_to_id(PADDING)
        return self.eod if pad is None else pad

    @property
    def start(self) -> int:
        """Token that stands for an empty context, as lm-evaluation-harness chooses it for a model of transformers."""
        for token in (*self.prefix[-1:], self._named.bos, self._named.eos):
            if token is not None:
                return token
        return self.eod

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens spelled out in it are taken as such."""
        return self._once(self._backend.encode(text).ids)

    def tokenize_bare(self, text: str) -> list[int]:
        """Return the tokens of a text without those that the tokenizer puts around it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, computed on all cores unless TOKENIZERS_PARALLELISM is false."""
        return [self._once(encoding.ids) for encoding in self._backend.encode_batch_fast(list(texts))]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones spelled out; padding of the vocabulary gives nothing."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def _once(self, ids: list[int]) -> list[int]:
        """`ids` without the tokenizer's prefix where the text itself begins with it."""
        count = len(self.prefix)
        return ids[count:] if count and tuple(ids[count : 2 * count]) == self.prefix else ids


def _put_around(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens that the tokenizer puts before every text, and after it."""
    try:
        encoding = backend.encode(MANY_SCRIPTS)
    except Exception:  # the library raises plain Exception for a word that has no token
        return (), ()
    marked = list(zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    before, after = (tuple(token for token, _ in takewhile(itemgetter(1), pairs)) for pairs in (marked, marked[::-1]))
    return before, after[::-1]


def hf_tokenizer(vocab_file: str | Path | None) -> FastTokenizer:
    """Return the tokenizer of one JSON file in the format of the `tokenizers` library (HFTokenizer)."""
    path = require_file(vocab_file, key="vocab_file", tokenizer_type="HFTokenizer")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: not a tokenizers JSON file ({_one_line(error)})") from error
    return FastTokenizer("HFTokenizer", backend, path)


def gpt2_tokenizer(vocab_file: str | Path | None, merge_file: str | Path | None) -> FastTokenizer:
    """Return GPT-2's byte-level BPE from its vocab.json and merges.txt (GPT2BPETokenizer)."""
    name = "GPT2BPETokenizer"
    vocab_path = require_file(vocab_file, key="vocab_file", tokenizer_type=name)
    merge_path = require_file(merge_file, key="merge_file", tokenizer_type=name)
    try:
        model, vocabulary = gpt2_model(vocab_path, merge_path)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{vocab_path}, {merge_path}: not a GPT-2 vocabulary ({_one_line(error)})") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([token for token in (END_OF_DOCUMENT, PADDING) if token in vocabulary])
    return FastTokenizer(name, backend, vocab_path)


def gpt2_model(vocab_path: Path, merge_path: Path) -> tuple[models.BPE, dict[str, int]]:
    """Return the model of GPT-2's two files, and its vocabulary.

    Raises:
        Exception: of whatever kind; they are malformed.
    """
    vocabulary = json.loads(vocab_path.read_text(encoding="utf-8-sig"))
    lines = merge_path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    merges = (line.split(" ") for line in lines if not line.startswith("#version"))
    return models.BPE(vocabulary, [(left, right) for left, right in merges]), vocabulary


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
