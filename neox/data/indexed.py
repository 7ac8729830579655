"""Reading tokenized corpora: a `.bin` file of raw tokens and an `.idx` file that says where each item lies.

Two index formats exist. "mmap" (magic `MMIDIDX`) is what every current tool writes; "cached" (magic `TNTIDX`)
is the older one. Both are memory-mapped here: opening costs nothing, and reading an item copies nothing.
"""

import hashlib
import struct
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neox.errors import DataError

MMAP_MAGIC = b"MMIDIDX\x00\x00"
CACHED_MAGIC = b"TNTIDX\x00\x00"
MMAP_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, items, length of doc_idx
CACHED_HEADER = struct.Struct("<8s6Q")  # magic, version, dtype code, token size, items, sizes, length of doc_idx

DTYPE_CODES: dict[int, np.dtype] = {
    code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f4", "<f8", "<u2"), start=1)
}


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
    sizes: np.ndarray
    starts: np.ndarray
    doc_idx: np.ndarray
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


def infer_data_impl(prefix: str | Path) -> str:
    """Return "mmap" or "cached", whichever the index file of this prefix is.

    Raises:
        DataError: the file is missing or is neither.
    """
    path = index_file(prefix)
    _require_file(path, prefix)
    with path.open("rb") as file:
        magic = file.read(len(MMAP_MAGIC))
    if magic == MMAP_MAGIC:
        return "mmap"
    if magic.startswith(CACHED_MAGIC):
        return "cached"
    raise DataError(f"{path}: not a dataset index (it starts with {magic!r}); make it with preprocess_data.py")


class IndexedDataset:
    """The items of one tokenized corpus, as arrays that point into the memory-mapped file.

    Args:
        prefix: path without `.bin` and `.idx`.
        data_impl: "infer", "mmap" or "cached"; anything but "infer" must be what the file is.
        warmup: read the whole `.bin` once, so that later reads hit the page cache.

    Raises:
        DataError: a file is missing, truncated, or not what its header says.
    """

    def __init__(self, prefix: str | Path, *, data_impl: str = "infer", warmup: bool = False) -> None:
        self.prefix = str(prefix)
        self.data_impl = data_impl
        found = infer_data_impl(prefix)
        if data_impl not in ("infer", found):
            raise DataError(f"{index_file(prefix)}: data_impl is '{data_impl}' but the file is '{found}'; use 'infer'")
        read = _read_mmap_index if found == "mmap" else _read_cached_index
        self.index = read(index_file(prefix))
        self._tokens = _map_tokens(prefix, self.index)
        if warmup:
            _read_through(data_file(prefix))

    def __len__(self) -> int:
        return len(self.index.sizes)

    def __getitem__(self, item: int) -> np.ndarray:
        return self.get(item)

    def __reduce__(self) -> tuple[type["IndexedDataset"], tuple[str]]:
        # Spawned loader workers reopen the files; pickling a memory map would copy the corpus.
        return IndexedDataset, (self.prefix,)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens per item, int32 or int64 [I]."""
        return self.index.sizes

    @property
    def doc_idx(self) -> np.ndarray:
        """Item at which each document starts, int64 [documents + 1]."""
        return self.index.doc_idx

    @property
    def dtype(self) -> np.dtype:
        """Type of the tokens on disk."""
        return self.index.dtype

    def get(self, item: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return `length` tokens of an item from `offset` on (all that follow by default), without a copy."""
        size = int(self.index.sizes[item])
        stop = size if length is None else offset + length
        assert 0 <= offset <= stop <= size, f"tokens {offset}:{stop} of item {item}, which has {size}"
        start = self.index.first_token(item)
        return self._tokens[start + offset : start + stop]

    @cached_property
    def fingerprint(self) -> dict[str, int | str]:
        """Identity of the layout (not of the tokens): everything that sample order depends on."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(np.ascontiguousarray(self.sizes).data)
        digest.update(np.ascontiguousarray(self.doc_idx).data)
        return {"index_bytes": index_file(self.prefix).stat().st_size, "layout": digest.hexdigest()}

    @property
    def fingerprint_with_content_date(self) -> dict[str, int | str]:
        """Identity of the layout and, by the date of the file, of the tokens (which are too many to hash)."""
        return {**self.fingerprint, "modified_ns": data_file(self.prefix).stat().st_mtime_ns}


def _require_file(path: Path, prefix: str | Path) -> None:
    if path.is_file():
        return
    hint = ""
    if str(prefix).endswith((".bin", ".idx")):
        hint = " (give the prefix without .bin or .idx)"
    raise DataError(f"{path}: no such file{hint}; a dataset is {prefix}.bin with {prefix}.idx")


def _map_bytes(path: Path) -> np.ndarray:
    """Map a file read-only, as uint8. A plain array: np.memmap's own indexing is several times slower."""
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)
    return np.asarray(np.memmap(path, np.uint8, mode="r"))


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


def _unpack_header(path: Path, raw: np.ndarray, header: struct.Struct) -> tuple[Any, ...]:
    if len(raw) < header.size:
        raise DataError(f"{path}: {len(raw)} bytes, too short for a header; truncated, make it again")
    return header.unpack(raw[: header.size].tobytes())


def _read_mmap_index(path: Path) -> ItemIndex:
    raw = _map_bytes(path)
    _, version, code, items, documents = _unpack_header(path, raw, MMAP_HEADER)
    dtype = _token_dtype(code, path)
    wanted = MMAP_HEADER.size + 12 * items + 8 * documents
    _check_header(path, version=version, bytes_found=len(raw), bytes_wanted=wanted)
    at = MMAP_HEADER.size
    sizes = raw[at : at + 4 * items].view("<i4")
    byte_starts = raw[at + 4 * items : at + 12 * items].view("<i8")
    return ItemIndex("mmap", dtype, sizes, byte_starts, raw[at + 12 * items :].view("<i8"), 1)


def _read_cached_index(path: Path) -> ItemIndex:
    raw = _map_bytes(path)
    _, version, code, itemsize, items, n_sizes, documents = _unpack_header(path, raw, CACHED_HEADER)
    dtype = _token_dtype(code, path)
    wanted = CACHED_HEADER.size + 8 * (2 * (items + 1) + n_sizes + documents)
    _check_header(path, version=version, bytes_found=len(raw), bytes_wanted=wanted)
    if itemsize != dtype.itemsize or n_sizes != items:
        raise DataError(f"{path}: items that are not plain rows of {dtype} tokens cannot be read")
    numbers = raw[CACHED_HEADER.size :].view("<i8")
    starts = numbers[items + 1 : 2 * items + 1]  # after the dimension offsets, which rows do not need
    sizes = numbers[2 * (items + 1) : 2 * (items + 1) + items]
    return ItemIndex("cached", dtype, sizes, starts, numbers[2 * (items + 1) + items :], itemsize)


def _map_tokens(prefix: str | Path, index: ItemIndex) -> np.ndarray:
    path = data_file(prefix)
    _require_file(path, prefix)
    raw = _map_bytes(path)
    tokens = index.first_token(-1) + int(index.sizes[-1]) if len(index.sizes) else 0
    if len(raw) != tokens * index.dtype.itemsize:
        raise DataError(
            f"{path}: {len(raw)} bytes, but {index_file(prefix).name} lists {tokens} tokens of "
            f"{index.dtype.itemsize} bytes; truncated or of another index, make the pair again"
        )
    if len(index.doc_idx) and int(index.doc_idx[-1]) != len(index.sizes):
        raise DataError(f"{index_file(prefix)}: its documents do not end at its last item; make the pair again")
    return raw.view(index.dtype)


def _read_through(path: Path) -> None:
    buffer = bytearray(1 << 24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            continue
