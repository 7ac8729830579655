"""Writing and reading native checkpoints."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from neox.checkpoint.manifest import LATEST, MANIFEST, Manifest
from neox.checkpoint.weights import missing_tensor
from neox.errors import CheckpointError, UserError
from neox.files import flush, write_whole

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.uint8: "uint8"}


Result = TypeVar("Result")

FILE_BYTES = 4 * 2**30
"""A rank starts another file after this much, so that it never holds more in memory while it saves."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to write: kind of file (`model`, `optimizer`, `random`), key, value on the CPU."""

    kind: str
    key: str
    value: torch.Tensor


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
) -> Path:
    """Write `root/global_step<iteration>` with every rank's share, and commit it.

    Everything goes to a folder of another name first; it is flushed to disk, renamed, and only then does `latest`
    name it. Killed at any point, the previous checkpoint stays whole and named.

    Args:
        root: the folder of checkpoints.
        iteration: number in the tag.
        tensors: what this rank writes; read to the end on every rank, even where writing fails.
        manifest: the manifest but for `files` and `tensors`, which are filled in here.
        configs: name -> text of configuration files.
        team: the ranks that write together.
        file_bytes: size at which a rank starts another file.

    Raises:
        CheckpointError: on every rank, if one could not write.
    """
    final = root / f"global_step{iteration}"
    temporary = root / f".global_step{iteration}.incomplete"
    _together(team, lambda: _fresh_folder(temporary) if team.rank == 0 else None)

    def write() -> list[_File]:
        with _drained(iter(tensors)) as remaining:
            return _write_files(temporary, remaining, team.rank, file_bytes)

    written = _together(team, write)

    def finish() -> None:
        if team.rank == 0:
            _write_manifest(temporary, manifest, [file for files in written for file in files], configs)
            _commit(temporary, final)

    _together(team, finish)
    return final


def _together(team: Team, work: Callable[[], Result]) -> list[Result]:
    """Do `work` on every rank and return all results; if it fails on one, raise on all, so that none waits for ever."""
    try:
        outcome: tuple[Result | None, str | None] = (work(), None)
    except OSError as error:
        outcome = (None, f"{error.filename or 'checkpoint'}: cannot be written ({error.strerror or error})")
    except (UserError, SafetensorError) as error:
        outcome = (None, f"checkpoint cannot be written: {error}")
    outcomes = team.gather(outcome)
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures:
        raise CheckpointError(f"{failures[0]}; the last checkpoint is untouched")
    return [result for result, _ in outcomes]


@contextmanager
def _drained(tensors: Iterator[StoredTensor]) -> Iterator[Iterator[StoredTensor]]:
    """The iterator, read to its end whatever happens: other ranks take part in making each tensor."""
    try:
        yield tensors
    finally:
        for _ in tensors:
            pass


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "configs").mkdir(parents=True)


def _write_files(folder: Path, tensors: Iterator[StoredTensor], rank: int, file_bytes: int) -> list[_File]:
    """Write this rank's tensors, a file as soon as one kind has filled it."""
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    files: list[_File] = []
    for tensor in tensors:
        of_kind = waiting.setdefault(tensor.kind, {})
        of_kind[tensor.key] = tensor.value
        if sum(value.nbytes for value in of_kind.values()) >= file_bytes:
            files.append(_write_file(folder, tensor.kind, rank, len(files), waiting.pop(tensor.kind)))
    for kind, of_kind in waiting.items():
        files.append(_write_file(folder, kind, rank, len(files), of_kind))
    return files


def _write_file(folder: Path, kind: str, rank: int, number: int, tensors: Mapping[str, torch.Tensor]) -> _File:
    path = folder / f"{kind}-{rank:05d}-{number:03d}.safetensors"
    save_file(dict(tensors), path)
    path.chmod(0o644)  # safetensors makes files that nobody else on a cluster could read
    flush(path)
    content = {
        key: {"file": path.name, "shape": list(tensor.shape), "dtype": DTYPE_NAMES[tensor.dtype]}
        for key, tensor in tensors.items()
    }
    return _File(path.name, path.stat().st_size, content)


def _write_manifest(folder: Path, manifest: Manifest, files: list[_File], configs: Mapping[str, str]) -> None:
    for name, text in configs.items():
        write_whole(folder / "configs" / Path(name).name, text)
    tensors: dict[str, dict[str, Any]] = {}
    for file in files:
        tensors |= file.content
    complete = replace(manifest, files={file.name: file.size for file in files}, tensors=tensors)
    write_whole(folder / MANIFEST, complete.to_json())


def _commit(temporary: Path, final: Path) -> None:
    """Give the finished folder its name, then move `latest`."""
    for folder in (temporary / "configs", temporary):
        flush(folder)
    replaced = final.with_name(f".{final.name}.replaced")  # `checkpoint_folder` knows this name
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    temporary.rename(final)
    flush(final.parent)
    write_whole(final.parent / LATEST, final.name)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def prune_checkpoints(root: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints written, never the one `latest` names.

    By time and not by number: a run that went back to an earlier iteration leaves higher numbers behind.
    """
    named = (root / LATEST).read_text().strip() if (root / LATEST).is_file() else ""
    manifests = sorted(root.glob(f"global_step*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns)
    for path in manifests[:-keep]:
        if path.parent.name != named:
            shutil.rmtree(path.parent, ignore_errors=True)


class NativeReader:
    """Reads tensors of one checkpoint, each file mapped once.

    Attributes:
        folder: the `global_step<N>` folder.
        manifest: what it says of itself.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._files: dict[str, Any] = {}

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
        name = entry["file"]
        try:
            if name not in self._files:
                self._files[name] = safe_open(self.folder / name, framework="pt")
            return self._files[name].get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / name}: damaged ({error}); copy it again") from None
