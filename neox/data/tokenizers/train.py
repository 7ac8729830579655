"""Training a byte-level BPE tokenizer."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from neox.data.documents import document_text, read_documents
from neox.data.text_files import SurrogateFilter
from neox.data.tokenizers.base import END_OF_DOCUMENT, PADDING
from neox.errors import DataError
from neox.files import write_whole

SPECIAL_TOKENS = (END_OF_DOCUMENT, PADDING)  # tokens 0 and 1
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte must have a token


def train_bpe(
    inputs: Sequence[str | Path],
    *,
    vocab_size: int,
    jsonl_key: str = "text",
    nfkc: bool = True,
    progress: bool = False,
    clean: SurrogateFilter | None = None,
) -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer (Sennrich et al. 2016, on bytes as in GPT-2) trained on documents.

    Args:
        inputs: files or folders, see `neox.data.documents.read_documents`.
        vocab_size: tokens in all; fewer come out where the text has too few pairs.
        jsonl_key: field of JSON lines that holds the text.
        nfkc: normalize text to NFKC before splitting (upstream's choice; it merges look-alike characters).
        progress: show the library's progress bar.
        clean: counts the documents with lone surrogates, for which U+FFFD stands.

    Raises:
        DataError: no text, an unreadable input, or a vocabulary smaller than 258.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(f"vocab_size {vocab_size}: at least {SMALLEST_VOCABULARY} (256 bytes and 2 special tokens)")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if nfkc:
        tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    tokenizer.train_from_iterator(_texts(inputs, jsonl_key, clean or SurrogateFilter()), trainer)
    return tokenizer


def _texts(inputs: Sequence[str | Path], jsonl_key: str, clean: SurrogateFilter) -> Iterator[str]:
    is_empty = True
    for document in read_documents(inputs):
        text = document_text(document, jsonl_key, clean)
        is_empty = is_empty and not text
        yield text
    if is_empty:
        raise DataError(f"{', '.join(map(str, inputs))}: no text; nothing to train on")


def save_tokenizer(tokenizer: tokenizers.Tokenizer, path: str | Path) -> None:
    """Write a tokenizer as one JSON file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_whole(Path(path), tokenizer.to_str(pretty=False))
