"""Writing and reading native checkpoints."""

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from neox.checkpoint.native.commit import begin, commit, discard
from neox.checkpoint.native.lineage import Lineage
from neox.checkpoint.native.manifest import MANIFEST, Manifest
from neox.checkpoint.storage.tensor_file import CODES, TensorFile, TensorFileWriter, checksum, raw_bytes
from neox.checkpoint.weights import missing_tensor
from neox.errors import CheckpointError, UnreadError, UnsavedError, UserError
from neox.files import write_whole
from neox.secrets import masked_text, masked_values

DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in CODES}

Result = TypeVar("Result")

FILE_BYTES = 4 * 2**30
"""A rank starts another file after this much, so that it never holds more in memory while it saves."""

_FULL = (errno.ENOSPC, errno.EDQUOT)

OPEN_FILES = 64
"""A reader has no more open at a time: a process may often open 1024, and a rank of 1000 writes three."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to write: kind of file (`model`, `optimizer`, `random`), key, value on the CPU."""

    kind: str
    key: str
    value: torch.Tensor


@dataclass(frozen=True)
class AnnouncedTensor:
    """A `StoredTensor` that will come, before it is there."""

    kind: str
    key: str
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class Team:
    """The ranks that write together.

    Attributes:
        rank, size: this rank and their number.
        gather: the objects of all ranks, by rank, on every rank; returns when all have come.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda item: [item]


@dataclass(frozen=True)
class _File:
    """A written file: name, size, and what is in it."""

    name: str
    size: int
    content: dict[str, dict[str, Any]]


def write_checkpoint(
    root: Path,
    *,
    iteration: int,
    tensors: Iterable[StoredTensor],
    manifest: Manifest,
    configs: Mapping[str, str],
    team: Team,
    file_bytes: int = FILE_BYTES,
    announced: Sequence[AnnouncedTensor] | None = None,
    add: Callable[[Path], None] | None = None,
) -> Path:
    """Write `root/global_step<iteration>` with every rank's share, and commit it.

    Everything goes to a folder of another name first; it is flushed to disk, renamed, and only then does `latest`
    name it. Killed at any point, the previous checkpoint stays whole and named. One of the same name is replaced where
    it is of the manifest's lineage.

    Args:
        root: the folder of checkpoints.
        iteration: number in the tag.
        tensors: what this rank writes; read to the end on every rank, even where writing fails.
        manifest: the manifest but for `files`, `tensors` and `checksums`, which are filled in here.
        configs: name -> text of configuration files.
        team: the ranks that write together.
        file_bytes: size at which a rank starts another file.
        announced: what `tensors` will be, in its order and one kind after another; then one tensor is in memory at a
            time, and otherwise a file.
        add: called by rank 0 with the folder when all of the above is in it, before it gets its name; may write more.

    Raises:
        UnsavedError: on every rank, if storage refused one.
        CheckpointError: on every rank, if one could not write for another reason, or another run's checkpoint is there.
    """
    final = root / f"global_step{iteration}"
    temporary = _together(team, lambda: _begin(final, manifest) if team.rank == 0 else None)[0]
    assert temporary is not None, "rank 0 made the folder"
    try:
        written = _together(team, lambda: _write_share(temporary, tensors, team, announced, file_bytes))
        files = [file for of_rank in written for file in of_rank]
        finish = partial(_finish, temporary, final, files, manifest, configs, add=add)
        _together(team, lambda: finish() if team.rank == 0 else None)
    finally:
        if team.rank == 0:
            discard(temporary)
    return final


def _begin(final: Path, manifest: Manifest) -> Path:
    """Make the folder to write in, if what is written may take the name of `final`."""
    Lineage.of(manifest).check_place(final)
    return begin(final)


def _finish(
    temporary: Path,
    final: Path,
    files: list[_File],
    manifest: Manifest,
    configs: Mapping[str, str],
    *,
    add: Callable[[Path], None] | None,
) -> None:
    """Complete the folder when all ranks have written their share, and commit it."""
    _write_manifest(temporary, manifest, files, configs)
    if add is not None:
        add(temporary)
    Lineage.of(manifest).make_way(final)
    commit(temporary, final)


@dataclass(frozen=True)
class _Failure:
    """Why a rank could not do its work, and the number of the system's error if storage refused it."""

    text: str
    errno: int | None


def _together(team: Team, work: Callable[[], Result]) -> list[Result]:
    """Do `work` on every rank and return all results; if it fails on one, raise on all, so that none waits for ever."""
    outcome: Result | _Failure
    try:
        outcome = work()
    except OSError as error:
        outcome = _Failure(
            f"{error.filename or 'checkpoint'}: cannot be written ({error.strerror or error})", error.errno
        )
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            outcome = _Failure(str(error).partition(";")[0], error.__cause__.errno)
        else:
            outcome = _Failure(
                f"checkpoint cannot be written: {error}", errno.EIO if isinstance(error, UnreadError) else None
            )
    outcomes = team.gather(outcome)
    failures = [found for found in outcomes if isinstance(found, _Failure)]
    if not failures:
        return outcomes
    lasting = [failure for failure in failures if failure.errno is None]
    text = f"{(lasting or failures)[0].text}; the last checkpoint is untouched"
    if lasting:
        raise CheckpointError(text)
    raise UnsavedError(text, is_full=any(failure.errno in _FULL for failure in failures))


@contextmanager
def _drained(tensors: Iterator[StoredTensor], *, is_shared: bool) -> Iterator[Iterator[StoredTensor]]:
    """The iterator, read to its end whatever happens, if other ranks take part in making each tensor."""
    try:
        yield tensors
    finally:
        if is_shared:
            for _ in tensors:
                pass


def _write_share(
    folder: Path,
    tensors: Iterable[StoredTensor],
    team: Team,
    announced: Sequence[AnnouncedTensor] | None,
    file_bytes: int,
) -> list[_File]:
    """Write what this rank has; its tensors are read to the end whatever happens."""
    with _drained(iter(tensors), is_shared=team.size > 1) as remaining:
        if announced is None:
            return _write_files(folder, remaining, team.rank, file_bytes)
        return _stream_files(folder, remaining, team.rank, divided(announced, file_bytes))


def _write_files(folder: Path, tensors: Iterator[StoredTensor], rank: int, file_bytes: int) -> list[_File]:
    """Write this rank's tensors, a file as soon as one kind has filled it."""
    waiting: dict[str, list[StoredTensor]] = {}
    files: list[_File] = []

    def write(kind: str) -> None:
        of_kind = waiting.pop(kind)
        entries = {tensor.key: (tensor.value.dtype, tensor.value.shape) for tensor in of_kind}
        files.append(_write_file(folder, f"{kind}-{rank:05d}-{len(files):03d}", entries, iter(of_kind)))

    for tensor in tensors:
        waiting.setdefault(tensor.kind, []).append(tensor)
        if sum(other.value.nbytes for other in waiting[tensor.kind]) >= file_bytes:
            write(tensor.kind)
    for kind in list(waiting):
        write(kind)
    return files


_Entries = dict[str, tuple[torch.dtype, torch.Size]]


def divided(announced: Sequence[AnnouncedTensor], file_bytes: int) -> list[tuple[str, _Entries]]:
    """Kind and content of each file: another one after `file_bytes`, and for another kind."""
    files: list[tuple[str, _Entries]] = []
    size = 0
    for tensor in announced:
        if not files or files[-1][0] != tensor.kind or size >= file_bytes:
            files.append((tensor.kind, {}))
            size = 0
        files[-1][1][tensor.key] = (tensor.dtype, tensor.shape)
        size += tensor.shape.numel() * tensor.dtype.itemsize
    return files


def _stream_files(
    folder: Path, tensors: Iterator[StoredTensor], rank: int, files: list[tuple[str, _Entries]]
) -> list[_File]:
    """Write this rank's tensors as they come into files whose content is known before."""
    return [
        _write_file(folder, f"{kind}-{rank:05d}-{number:03d}", entries, tensors)
        for number, (kind, entries) in enumerate(files)
    ]


def _write_file(folder: Path, stem: str, entries: _Entries, tensors: Iterator[StoredTensor]) -> _File:
    path = folder / f"{stem}.safetensors"
    with TensorFileWriter(path, entries) as writer:
        for _ in entries:
            _write_next(writer, tensors)
    content = {
        key: {
            "file": path.name,
            "shape": list(shape),
            "dtype": DTYPE_NAMES[dtype],
            "checksum": writer.checksums[key],
        }
        for key, (dtype, shape) in entries.items()
    }
    return _File(path.name, path.stat().st_size, content)


def _write_next(writer: TensorFileWriter, tensors: Iterator[StoredTensor]) -> None:
    """A function of its own, so that a tensor is gone before the next one is made."""
    tensor = next(tensors)
    writer.write(tensor.key, tensor.value)


def _write_manifest(folder: Path, manifest: Manifest, files: list[_File], configs: Mapping[str, str]) -> None:
    sizes = {file.name: file.size for file in files}
    checksums: dict[str, str] = {}
    for given, original in configs.items():
        name, text = f"configs/{Path(given).name}", masked_text(original)
        write_whole(folder / name, text)
        sizes[name], checksums[name] = len(text.encode()), checksum(text.encode())
    tensors: dict[str, dict[str, Any]] = {}
    for file in files:
        tensors |= file.content
    config = masked_values(manifest.config)
    complete = replace(manifest, config=config, files=sizes, tensors=tensors, checksums=checksums)
    write_whole(folder / MANIFEST, complete.to_json())


class NativeReader:
    """Reads tensors of one checkpoint, each compared with its checksum.

    Attributes:
        folder: the `global_step<N>` folder.
        manifest: what it says of itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._by_file = self.manifest.by_file()
        self._files: dict[str, TensorFile] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.manifest.tensors

    @property
    def padded_vocab_size(self) -> int:
        """Size of the softmax the model was made with."""
        return self.manifest.padded_vocab_size

    def names(self) -> list[str]:
        """Canonical names of the parameters."""
        return [key for key in self.manifest.tensors if key.startswith("layers.") and "/" not in key]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shape of each parameter, without reading one."""
        return {name: tuple(self.manifest.tensors[name]["shape"]) for name in self.names()}

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor of a key, whole, on the CPU.

        Raises:
            CheckpointError: if the checkpoint has no such tensor or its file is damaged.
        """
        entry = self.manifest.tensors.get(key)
        if entry is None:
            raise missing_tensor(self.folder, key)
        return checked_tensor(self._file(entry["file"]), key, entry["checksum"])

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            if len(self._files) == OPEN_FILES:
                self._files.pop(next(iter(self._files)))
            self._files[name] = open_tensor_file(self.folder / name, self._by_file[name])
        return self._files[name]


def open_tensor_file(path: Path, tensors: Mapping[str, Mapping[str, Any]]) -> TensorFile:
    """Open a file of a native checkpoint.

    Args:
        path: the file.
        tensors: the manifest's entries of all that should be in it.

    Raises:
        CheckpointError: it is missing or no such file, or holds something else than the manifest says.
    """
    file = TensorFile(path)
    found = {key: (DTYPE_NAMES[entry.dtype], list(entry.shape)) for key, entry in file.entries.items()}
    expected = {key: (entry["dtype"], entry["shape"]) for key, entry in tensors.items()}
    for key in expected | found:
        if found.get(key) != expected.get(key):
            raise CheckpointError(
                f"{path}: damaged, it has {_described(found.get(key))} for {key}, "
                f"the manifest says {_described(expected.get(key))}; copy it again"
            )
    return file


def _described(tensor: tuple[str, list[int]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {tensor[1]}"


def checked_tensor(file: TensorFile, key: str, expected: str) -> torch.Tensor:
    """Read a tensor and compare it with its checksum.

    Raises:
        CheckpointError: it is not what was written.
    """
    tensor = file.tensor(key)
    if checksum(raw_bytes(tensor)) != expected:
        raise CheckpointError(f"{file.path}: damaged, {key} is not what was written; copy it again")
    return tensor
