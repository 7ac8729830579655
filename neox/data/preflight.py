"""What can be seen of the data before a run reads them: files, ids, splits, ends of documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from neox.data.build import NAMES, SPLITS, is_wanted, without_documents
from neox.data.completions import CompletionSource, completion_sources
from neox.data.indexed import IndexedDataset, open_corpus
from neox.data.tokenizers import build_tokenizer
from neox.errors import DataError

if TYPE_CHECKING:
    from neox.config import Config
    from neox.config.data import DataConfig

DOCUMENTS_SEEN, TOKENS_SEEN = 64, 1 << 14
"""How many documents of a corpus are searched for the token that ends one, and how many tokens of each."""

SIZES_READ = 1 << 20
"""Lengths of documents in memory at a time."""


def check_data(config: "Config") -> None:
    """Open every file of the data, look at some of their ids, and see that there are documents for what is asked.

    Raises:
        DataError: a file is missing or damaged, made for a larger vocabulary, or too small for its split.
    """
    for corpus in _corpora(config):
        corpus.check_ids()
    without_documents(config)
    if config.training.char_level_ppl:
        build_tokenizer(config.tokenizer)
    if config.data.eod_mask_loss:
        _end_of_document(config)


def data_remarks(config: "Config") -> Iterator[str]:
    """Lines on evaluations that do not take place, and on documents that are not what a key makes of them."""
    yield from without_documents(config)
    yield from _remarks_on_validation(config)
    yield from _remarks_on_lengths(config)
    yield from _remarks_on_labels(config)
    if (config.data.eod_mask_loss or config.data.document_masking) and has_tokenizer(config):
        end = _end_of_document(config)
        if end is not None:
            for corpus in _token_corpora(config):
                yield from _remarks_on_ends(corpus, end, config.data)


def has_tokenizer(config: "Config") -> bool:
    """Whether the tokenizer is at hand; much of training needs none."""
    settings = config.tokenizer
    return settings.tokenizer_type == "CharLevelTokenizer" or (
        settings.vocab_file is not None and Path(settings.vocab_file).is_file()
    )


def _end_of_document(config: "Config") -> int | None:
    """The token that ends documents; None where there is none and no key needs it.

    Raises:
        DataError: the tokenizer cannot be read, or has no such token and `eod_mask_loss` needs it.
    """
    tokenizer = build_tokenizer(config.tokenizer)
    try:
        return tokenizer.eod
    except DataError:
        if config.data.eod_mask_loss:
            raise
        return None


def _remarks_on_validation(config: "Config") -> Iterator[str]:
    training = config.training
    if not training.do_valid or not {"do_valid", "eval_iters", "eval_interval"} & config.given.keys():
        return
    if training.eval_iters == 0:
        yield "do_valid: eval_iters is 0, so there is no validation"
    elif training.do_train and 0 < (training.train_iters or 0) < training.eval_interval:
        interval = f"eval_interval {training.eval_interval}"
        yield f"{interval}: above train_iters {training.train_iters}, so there is no validation"


def _remarks_on_labels(config: "Config") -> Iterator[str]:
    """Lines on evaluations that count every token, where training does not; both losses are of different things."""
    for split in SPLITS[1:]:
        has_labels = getattr(config.data, f"{split}_label_data_paths")
        if config.data.train_label_data_paths and not has_labels and is_wanted(config, split):
            yield (
                f"{split}_label_data_paths: not set, and train_label_data_paths is, so {NAMES[split]} takes the loss "
                "of every token, and not only of those that are trained on"
            )


def _remarks_on_lengths(config: "Config") -> Iterator[str]:
    """Lines on documents too long for a sample, of which the rest is never read; packed ones go on in the next."""
    if config.data.pack_impl == "packed" and not config.preference.is_on:
        return
    most, what = config.model.seq_length + 1, "are cut there" if config.data.allow_chopped else "are left out"
    for corpus in _token_corpora(config):
        chunks = (corpus.sizes[start : start + SIZES_READ] for start in range(0, len(corpus), SIZES_READ))
        if longer := sum(int((chunk > most).sum()) for chunk in chunks):
            many = f"{longer:,} of {len(corpus):,} documents"
            yield f"{corpus.prefix}: {many} have more than seq_length + 1 = {most} tokens and {what}"


def _corpora(config: "Config") -> Iterator[IndexedDataset]:
    """Every corpus of ids that the configuration names, opened."""
    yield from _token_corpora(config)
    for prefix in _named(config, "_label"):
        yield open_corpus(config, prefix, "labels", warmup=False)
    for source in _scored(config):
        yield from (side.labels for side in source.sides)


def _token_corpora(config: "Config") -> Iterator[IndexedDataset]:
    for prefix in [config.data.data_path] if config.data.data_path else _named(config, ""):
        yield open_corpus(config, prefix, warmup=False)
    for source in _scored(config):
        yield from (side.tokens for side in source.sides)


def _named(config: "Config", kind: str) -> list[str]:
    """The prefixes of a kind of lists, each once."""
    lists = (getattr(config.data, f"{split}{kind}_data_paths") or () for split in SPLITS)
    return list(dict.fromkeys(prefix for paths in lists for prefix in paths))


def _scored(config: "Config") -> Iterator[CompletionSource]:
    if config.preference.is_on and config.comparison.dataset_impl != "online":
        for split in SPLITS:
            yield from completion_sources(config, split)


def _remarks_on_ends(corpus: IndexedDataset, end: int, data: "DataConfig") -> Iterator[str]:
    """Lines where the end-of-document token does not stand at the end of each document, and only there."""
    documents = range(min(DOCUMENTS_SEEN, len(corpus)))
    if not documents:
        return
    holds, holds_within = (sum(found) for found in zip(*(_holds(corpus, n, end) for n in documents), strict=True))
    where = f"{corpus.prefix}: of the first {len(documents)} documents"
    if data.eod_mask_loss and not holds:
        yield f"{where} none has the end-of-document token {end}, so eod_mask_loss masks nothing"
    if data.eod_mask_loss and holds_within:
        yield f"{where} {holds_within} have the end-of-document token {end} inside; eod_mask_loss masks the loss there"
    if data.document_masking and holds_within:
        yield f"{where} {holds_within} have the end-of-document token {end} inside; document_masking does not cut there"


def _holds(corpus: IndexedDataset, document: int, token: int) -> tuple[bool, bool]:
    """Whether a document has this token, and whether it has it before its end; a long one is read in part."""
    size = int(corpus.sizes[document])
    is_token = corpus.get(document, 0, min(size, TOKENS_SEEN)) == token
    return bool(is_token.any()), bool(is_token[: size - 1].any())
