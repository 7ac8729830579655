"""Reading tokenized corpora: a `.bin` file of raw tokens and an `.idx` file that says where each item lies.

Two index formats exist. "mmap" (magic `MMIDIDX`) is what every current tool writes; "cached" (magic `TNTIDX`)
is the older one. Of both, what is asked for is read then (`neox.data.stored`): opening costs nothing and holds nothing.
"""

import contextlib
import hashlib
import struct
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from neox.data.ids import AllowedIds
from neox.data.stored import StoredArray, StoredFile
from neox.downloads import failed_download
from neox.errors import DataError
from neox.patience import IMPATIENT, Patience

if TYPE_CHECKING:
    from neox.config import Config

MMAP_MAGIC = b"MMIDIDX\x00\x00"
CACHED_MAGIC = b"TNTIDX\x00\x00"
MMAP_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items, length of doc_idx
CACHED_HEADER = struct.Struct("<8s6Q")  # magic, version, dtype code, token size, items, sizes, length of doc_idx

DTYPE_CODES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f4", "<f8", "<u2"), start=1)
}

INT64 = np.dtype("<i8")

_ROWS_HASHED = 1 << 20
_CHUNK, _CHUNKS_CHECKED = 1 << 16, 32


class ItemIndex(NamedTuple):
    """What an `.idx` file says: I items in D - 1 documents.

    Attributes:
        kind: "mmap" or "cached".
        dtype: of the tokens.
        sizes: int [I], tokens per item.
        starts: int64 [I], position of each item's first token in the `.bin`, in units of `start_bytes`.
        doc_idx: int64 [D], item at which each document starts; the last entry is I.
        start_bytes: 1 where the format counts bytes, the token's size where it counts tokens.
    """

    kind: str
    dtype: np.dtype
    sizes: StoredArray
    starts: StoredArray
    doc_idx: StoredArray
    start_bytes: int

    def first_token(self, item: int) -> int:
        """Return the position of an item's first token in the `.bin`, in tokens."""
        return int(self.starts[item]) * self.start_bytes // self.dtype.itemsize


def data_file(prefix: str | Path) -> Path:
    """Return the path of the token file of a dataset prefix."""
    return Path(f"{prefix}.bin")


def index_file(prefix: str | Path) -> Path:
    """Return the path of the index file of a dataset prefix."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """The items of one tokenized corpus.

    Args:
        prefix: path without `.bin` and `.idx`.
        data_impl: "infer", "mmap" or "cached"; anything but "infer" must be what the file is.
        warmup: read the whole `.bin` once, so that later reads hit the page cache.
        patience: how long a read that fails is tried again.
        allowed: what its ids may be, which is checked in all that is read; None where they are not a model's tokens.

    Raises:
        DataError: a file is missing, truncated, or not what its header says.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        data_impl: str = "infer",
        warmup: bool = False,
        patience: Patience = IMPATIENT,
        allowed: AllowedIds | None = None,
    ) -> None:
        self.prefix = str(prefix)
        self.data_impl = data_impl
        self.patience = patience
        self.allowed = allowed
        index = _open(index_file(prefix), prefix, patience)
        found = _kind(index)
        if data_impl not in ("infer", found):
            raise DataError(f"{index_file(prefix)}: data_impl is '{data_impl}' but the file is '{found}'; use 'infer'")
        self.index = _read_mmap_index(index) if found == "mmap" else _read_cached_index(index)
        self._tokens = _tokens(prefix, self.index, patience)
        if allowed is not None:
            allowed.check_type(self.dtype, self.prefix)
        if warmup:
            _read_through(self._tokens.file)

    def __len__(self) -> int:
        return len(self.index.sizes)

    def __getitem__(self, item: int) -> np.ndarray:
        return self.get(item)

    def __reduce__(self) -> tuple[Callable[..., "IndexedDataset"], tuple[str]]:
        # A spawned worker opens the files anew.
        return partial(IndexedDataset, patience=self.patience, allowed=self.allowed), (self.prefix,)

    @property
    def sizes(self) -> StoredArray:
        """Tokens per item, int32 or int64 [I]."""
        return self.index.sizes

    @property
    def doc_idx(self) -> StoredArray:
        """Item at which each document starts, int64 [documents + 1]."""
        return self.index.doc_idx

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens on disk."""
        return self.index.dtype

    def get(self, item: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return `length` tokens of an item from `offset` on (all that follow by default).

        Raises:
            DataError: there is an id among them that is not allowed.
            LostDataError: the file cannot be read, and could not for as long as `patience` has it tried.
        """
        if length is None:
            length = int(self.index.sizes[item]) - offset
        assert offset >= 0 <= length, f"{length} tokens from {offset} of item {item}"
        start = self.index.first_token(item) + offset
        return self._checked(start, start + length)

    def check_ids(self) -> None:
        """Check up to two million ids: all of a small corpus, evenly spread chunks of a larger one.

        Raises:
            DataError: one of them is not allowed.
        """
        size = len(self._tokens)
        chunks = min(_CHUNKS_CHECKED, -(-size // _CHUNK))
        for start in np.linspace(0, max(0, size - _CHUNK), chunks, dtype=np.int64).tolist():
            self._checked(start, min(start + _CHUNK, size))

    def check_items(self) -> None:
        """Check that every item lies in the `.bin`; reads all of the index.

        Raises:
            DataError: one does not.
        """
        width = self.dtype.itemsize
        for start in range(0, len(self), _ROWS_HASHED):
            sizes = self.sizes[start : start + _ROWS_HASHED].astype(np.int64)
            firsts = self.index.starts[start : start + _ROWS_HASHED] * self.index.start_bytes // width
            outside = (sizes < 0) | (firsts < 0) | (firsts + sizes > len(self._tokens))
            if outside.any():
                where = f"item {start + int(outside.argmax())} does not lie in {data_file(self.prefix).name}"
                raise DataError(f"{index_file(self.prefix)}: {where}; damaged, make the pair again")

    def _checked(self, start: int, stop: int) -> np.ndarray:
        tokens = self._tokens.rows(start, stop)
        if self.allowed is not None:
            self.allowed.check(tokens, self.prefix)
        return tokens

    @cached_property
    def fingerprint(self) -> dict[str, int | str]:
        """Identity of the layout (not of the tokens): everything that sample order depends on."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.sizes, self.doc_idx):
            for start in range(0, len(array), _ROWS_HASHED):
                digest.update(array[start : start + _ROWS_HASHED].data)
        return {"index_bytes": self.sizes.file.size, "layout": digest.hexdigest()}

    @property
    def fingerprint_with_content_date(self) -> dict[str, int | str]:
        """Identity of the layout and, by the date of the file, of the tokens (which are too many to hash)."""
        return {**self.fingerprint, "modified_ns": data_file(self.prefix).stat().st_mtime_ns}


def open_corpus(
    config: "Config",
    prefix: str,
    holds: Literal["tokens", "labels", "numbers"] = "tokens",
    *,
    warmup: bool = True,
) -> IndexedDataset:
    """Open the corpus of a prefix as the configuration asks for; its ids are checked where the vocabulary is known.

    Args:
        config: the run.
        prefix: path without `.bin` and `.idx`.
        holds: what the numbers of the corpus are.
        warmup: whether it is opened to be read, so that `mmap_warmup` applies.

    Raises:
        DataError: see `IndexedDataset`.
    """
    rows = config.model.padded_vocab_size
    return IndexedDataset(
        prefix,
        data_impl=config.data.data_impl,
        warmup=warmup and config.data.mmap_warmup,
        patience=Patience(config.reliability.retry_time),
        allowed=None if holds == "numbers" or rows is None else AllowedIds(rows, are_labels=holds == "labels"),
    )


def _open(path: Path, prefix: str | Path, patience: Patience) -> StoredFile:
    with contextlib.suppress(OSError):  # other than a missing file: tried again below
        if not path.is_file():
            hint = ""
            if str(prefix).endswith((".bin", ".idx")):
                hint = " (give the prefix without .bin or .idx)"
            elif "," in str(prefix):
                hint = " (one dataset is named here; name several in train_, valid_ and test_data_paths)"
            raise DataError(f"{path}: no such file{hint}; a dataset is {prefix}.bin with {prefix}.idx")
    return StoredFile(path, patience)


def _kind(index: StoredFile) -> str:
    """Which of the two formats an index file has."""
    magic = index.read(np.dtype(np.uint8), min(index.size, len(MMAP_MAGIC)), 0).tobytes()
    if magic == MMAP_MAGIC:
        return "mmap"
    if magic.startswith(CACHED_MAGIC):
        return "cached"
    reason = f"not a dataset index (it starts with {magic!r}); make it with preprocess_data.py"
    raise DataError(f"{index.path}: {failed_download(index.path) or reason}")


def _token_dtype(code: int, path: Path) -> np.dtype:
    if code not in DTYPE_CODES:
        raise DataError(f"{path}: unknown token type code {code}; the file is damaged or of another format")
    return DTYPE_CODES[code]


def _check_header(path: Path, *, version: int, bytes_found: int, bytes_wanted: int) -> None:
    if version != 1:
        raise DataError(f"{path}: index version {version}, but only 1 is known")
    if bytes_found != bytes_wanted:
        raise DataError(
            f"{path}: {bytes_found} bytes, but its header asks for {bytes_wanted}; truncated or damaged, make it again"
        )


def _unpack_header(file: StoredFile, header: struct.Struct) -> tuple[Any, ...]:
    if file.size < header.size:
        raise DataError(f"{file.path}: {file.size} bytes, too short for a header; truncated, make it again")
    return header.unpack(file.read(np.dtype(np.uint8), header.size, 0).tobytes())


def _read_mmap_index(file: StoredFile) -> ItemIndex:
    _, version, code, items, documents = _unpack_header(file, MMAP_HEADER)
    dtype = _token_dtype(code, file.path)
    at = MMAP_HEADER.size
    _check_header(file.path, version=version, bytes_found=file.size, bytes_wanted=at + 12 * items + 8 * documents)
    sizes = StoredArray(file, np.dtype("<i4"), at, items)
    byte_starts = StoredArray(file, INT64, at + 4 * items, items)
    return ItemIndex("mmap", dtype, sizes, byte_starts, StoredArray(file, INT64, at + 12 * items, documents), 1)


def _read_cached_index(file: StoredFile) -> ItemIndex:
    _, version, code, itemsize, items, n_sizes, documents = _unpack_header(file, CACHED_HEADER)
    dtype = _token_dtype(code, file.path)
    at = CACHED_HEADER.size
    wanted = at + 8 * (2 * (items + 1) + n_sizes + documents)
    _check_header(file.path, version=version, bytes_found=file.size, bytes_wanted=wanted)
    if itemsize != dtype.itemsize or n_sizes != items:
        raise DataError(f"{file.path}: items that are not plain rows of {dtype} tokens cannot be read")
    starts = StoredArray(
        file, INT64, at + 8 * (items + 1), items
    )  # after the dimension offsets, which rows do not need
    sizes = StoredArray(file, INT64, at + 16 * (items + 1), items)
    return ItemIndex(
        "cached", dtype, sizes, starts, StoredArray(file, INT64, wanted - 8 * documents, documents), itemsize
    )


def _tokens(prefix: str | Path, index: ItemIndex, patience: Patience) -> StoredArray:
    path = data_file(prefix)
    file = _open(path, prefix, patience)
    tokens = index.first_token(-1) + int(index.sizes[-1]) if len(index.sizes) else 0
    if file.size != tokens * index.dtype.itemsize:
        found = failed_download(path) or (
            f"{file.size} bytes, but {index_file(prefix).name} lists {tokens} tokens of "
            f"{index.dtype.itemsize} bytes; truncated or of another index, make the pair again"
        )
        raise DataError(f"{path}: {found}")
    if len(index.doc_idx) and int(index.doc_idx[-1]) != len(index.sizes):
        raise DataError(f"{index_file(prefix)}: its documents do not end at its last item; make the pair again")
    return StoredArray(file, index.dtype, 0, tokens)


def _read_through(file: StoredFile) -> None:
    step = 1 << 24
    for start in range(0, file.size, step):
        file.read(np.dtype(np.uint8), min(step, file.size - start), start)
