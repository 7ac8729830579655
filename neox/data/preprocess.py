"""Tokenizing text into `.bin/.idx` files, with worker processes, in the order of the input."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from neox.data.documents import Document, document_fields, read_documents, require_distinct
from neox.data.indexed_writer import IndexedDatasetWriters, smallest_token_dtype
from neox.data.packages import optional_package
from neox.data.text_files import SurrogateFilter
from neox.data.tokenizers import Tokenizer, build_tokenizer
from neox.errors import DataError

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 4_000_000  # bounds the memory of a batch whatever the length of documents
BATCHES_AHEAD = 3  # waiting for each worker: enough to keep it busy, few enough to bound memory


@dataclass(frozen=True)
class PreprocessOptions:
    """What to tokenize and how.

    Attributes:
        inputs: files or folders, see `neox.data.documents.read_documents`.
        output_prefix: each key goes to `<output_prefix>_<key>_document.{bin,idx}`.
        tokenizer_type, vocab_file, merge_file: the tokenizer, as in the configuration.
        jsonl_keys: fields of JSON lines to tokenize.
        append_eod: end every document with the end-of-document token, unless the tokenizer does so itself.
        ftfy: fix broken Unicode first (needs ftfy).
        num_docs: stop after so many documents; None for all.
        workers: processes that tokenize; 1 means this one (whose tokenizer may use several threads).
        log_interval: documents between updates of the progress bar.
        progress: show the progress bar.
    """

    inputs: Sequence[str | Path]
    output_prefix: str
    tokenizer_type: str
    vocab_file: str | None = None
    merge_file: str | None = None
    jsonl_keys: Sequence[str] = field(default=("text",))
    append_eod: bool = False
    ftfy: bool = False
    num_docs: int | None = None
    workers: int = 1
    log_interval: int = 1000
    progress: bool = True


class PreprocessSummary(NamedTuple):
    """What was written.

    Attributes:
        documents: written, for each key.
        empty: passed over, because no key had any text.
        replaced: in which lone surrogates were replaced by U+FFFD.
        tokens: by key.
        prefixes: of the files written, by key.
    """

    documents: int
    empty: int
    replaced: int
    tokens: dict[str, int]
    prefixes: dict[str, str]


class _Encoded(NamedTuple):
    """A batch of documents: for each key one row of tokens and the documents' lengths."""

    columns: list[tuple[np.ndarray, np.ndarray]]
    empty: int
    replaced: int


def preprocess(options: PreprocessOptions) -> PreprocessSummary:
    """Tokenize documents into indexed datasets, one for each key; documents without text are passed over.

    A document that is empty in some keys only is kept in all, so that the datasets stay aligned.

    Raises:
        DataError: a missing or malformed input, a tokenizer that cannot be built, a worker that was killed, or no
            room for the files; nothing is left behind.
    """
    require_distinct(options.jsonl_keys)
    tokenizer = build_tokenizer(options)
    encode = _encoder(options, tokenizer)  # also where workers encode: a missing package is reported before they start
    dtype = smallest_token_dtype(tokenizer.vocab_size)
    prefixes = {key: f"{options.output_prefix}_{key}_document" for key in options.jsonl_keys}
    documents = islice(read_documents(options.inputs), options.num_docs)
    counts, written, empty, replaced = dict.fromkeys(prefixes, 0), 0, 0, 0
    with ExitStack() as stack:
        group = stack.enter_context(IndexedDatasetWriters())
        writers = [group.open(prefix, dtype) for prefix in prefixes.values()]
        bar = stack.enter_context(
            tqdm(unit=" docs", miniters=options.log_interval, disable=not options.progress, smoothing=0.05)
        )
        for batch in stack.enter_context(closing(_encode_all(options, encode, _batches(documents)))):
            for key, writer, (tokens, sizes) in zip(prefixes, writers, batch.columns, strict=True):
                writer.add_documents(tokens, sizes)
                counts[key] += len(tokens)
            written += len(batch.columns[0][1])
            empty += batch.empty
            replaced += batch.replaced
            bar.update(len(batch.columns[0][1]) + batch.empty)
        if not written:
            raise DataError(f"{', '.join(map(str, options.inputs))}: no document with text; nothing to write")
    return PreprocessSummary(written, empty, replaced, counts, prefixes)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.raw)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_all(
    options: PreprocessOptions, encode: Callable[[list[Document]], _Encoded], batches: Iterator[list[Document]]
) -> Generator[_Encoded, None, None]:
    """Encode batches here or in worker processes; results come in the order of the input."""
    if options.workers <= 1:
        yield from map(encode, batches)
        return
    executor = ProcessPoolExecutor(options.workers, initializer=_start_worker, initargs=(options,))
    waiting: deque[Future[_Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(executor.submit(_encode_in_worker, batch))
            if len(waiting) >= options.workers * BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"a worker process was killed; out of memory? use fewer --workers than {options.workers}"
        ) from None
    except OSError as error:
        raise DataError(
            f"--workers {options.workers}: that many processes cannot be started ({error.strerror}); use fewer"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


_worker: dict[str, Callable[[list[Document]], _Encoded]] = {}  # filled in worker processes only


def _start_worker(options: PreprocessOptions) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker["encode"] = _encoder(options, build_tokenizer(options))


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, killed say: else it waits for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: list[Document]) -> _Encoded:
    return _worker["encode"](batch)


def _encoder(options: PreprocessOptions, tokenizer: Tokenizer) -> Callable[[list[Document]], _Encoded]:
    appends = options.append_eod and tokenizer.suffix[-1:] != (tokenizer.eod,)
    return partial(
        _encode,
        tokenizer=tokenizer,
        keys=options.jsonl_keys,
        mend=optional_package("ftfy", needed_by="--ftfy").fix_text if options.ftfy else None,
        ending=[tokenizer.eod] if appends else [],
    )


def _encode(
    batch: list[Document],
    *,
    tokenizer: Tokenizer,
    keys: Sequence[str],
    mend: Callable[[str], str] | None,
    ending: list[int],
) -> _Encoded:
    clean = SurrogateFilter()
    rows = [document_fields(document, keys, clean) for document in batch]
    columns = []
    for texts in zip(*rows, strict=True):
        columns.append(_tokenize(tokenizer, batch, [mend(text) for text in texts] if mend else texts))
    around = len(tokenizer.prefix) + len(tokenizer.suffix)
    kept = [number for number in range(len(batch)) if any(len(column[number]) > around for column in columns)]
    return _Encoded([_flatten(column, kept, ending) for column in columns], len(batch) - len(kept), clean.documents)


def _tokenize(tokenizer: Tokenizer, batch: list[Document], texts: Sequence[str]) -> list[list[int]]:
    """Tokenize one text of each document of a batch; a text that the tokenizer cannot take is named."""
    try:
        return tokenizer.tokenize_batch(texts)
    except Exception:  # libraries raise whatever they like
        for document, text in zip(batch, texts, strict=True):
            try:
                tokenizer.tokenize(text)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise DataError(f"{document.place}: the tokenizer cannot take this text ({reason})") from error
        raise


def _flatten(column: list[list[int]], kept: list[int], ending: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Lay documents end to end: int32 tokens and int32 lengths."""
    rows = [np.asarray(column[number] + ending, np.int32) for number in kept]
    sizes = np.asarray([len(row) for row in rows], np.int32)
    return (np.concatenate(rows) if rows else np.empty(0, np.int32)), sizes
