"""What a native checkpoint says about itself.

Layout of a folder of checkpoints:

    latest                              text, "global_step<N>"; moved last
    global_step<N>/manifest.json        this file's `Manifest`
    global_step<N>/model-<rank>-<k>.safetensors     parameters, whole, under canonical names, in the model's dtype
    global_step<N>/optimizer-<rank>-<k>.safetensors `<name>/<state>`: master (fp32 weights), exp_avg, exp_avg_sq, ...
    global_step<N>/random-<rank>-<k>.safetensors    state of each rank's dropout stream
    global_step<N>/configs/*.yml                  the configuration files as given

Beside them, names that begin with a dot: a folder being written (`.incomplete`), one that another of the same name has
taken the place of (`.replaced`), one being deleted (`.deleted`). The next save clears away what a killed run left.

Each tensor lies whole in the file of one rank; which rank says nothing about its content, so any layout can read
what any other has written.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from neox.checkpoint.storage.tensor_file import checksum
from neox.errors import CheckpointError, UnreadError
from neox.files import is_inside
from neox.patience import is_mistake, unreadable

FORMAT = "neox-native"
VERSION = 2
MANIFEST = "manifest.json"
LATEST = "latest"


@dataclass(frozen=True)
class Layout:
    """The process grid that wrote a checkpoint."""

    pipe_parallel_size: int
    data_parallel_size: int
    model_parallel_size: int
    zero_stage: int


@dataclass(frozen=True)
class Progress:
    """How far a run had come.

    Attributes:
        iteration: optimizer steps tried, those that were left out included.
        consumed_samples: place in the order of the training sequences: those read, and those passed over.
        schedule_step: updates made; the learning rate follows it.
        optimizer_step: Adam's step count.
        loss_scaler: state of fp16's dynamic loss scale; empty in other precisions.
        left_out: ranges [start, end) of that order that are passed over.
        recent_losses: of the last updates, where spikes are looked for; else empty.
    """

    iteration: int = 0
    consumed_samples: int = 0
    schedule_step: int = 0
    optimizer_step: int = 0
    loss_scaler: dict[str, float] = field(default_factory=dict)
    left_out: list[list[int]] = field(default_factory=list)
    recent_losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but the tensors.

    Attributes:
        progress: where the run stood.
        layout: who wrote it.
        padded_vocab_size: size of the softmax.
        precision: dtype of the model.
        schedule: learning-rate schedule, for comparison on load.
        optimizer: type of the optimizer, None where only weights were saved.
        config: flat resolved configuration of the run.
        files: bytes of each file.
        tensors: file, shape, dtype and checksum of each tensor key.
        checksums: of the files that hold no tensors.
        environment: code, packages and data of the run, for comparison on load; empty where it is not known.
        forward_losses: of fixed sequences, with `checkpoint_validation_with_forward_pass`; else empty.
        run: name of the run that wrote it, drawn once; empty for weights that no run wrote, an import say.
        lineage: the runs that it was resumed from in other folders, the oldest first.
    """

    progress: Progress
    layout: Layout
    padded_vocab_size: int
    precision: str
    schedule: dict[str, Any]
    optimizer: str | None
    config: dict[str, Any]
    files: dict[str, int]
    tensors: dict[str, dict[str, Any]]
    checksums: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    forward_losses: list[float] = field(default_factory=list)
    run: str = ""
    lineage: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """As text, with a checksum of itself."""
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        content = json.loads(json.dumps(content, default=str))  # as a reader will have it: keys are text
        return json.dumps({"checksum": _checksum(content)} | content, indent=1)

    def by_file(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The entries of `tensors`, by the file they are in."""
        files: dict[str, dict[str, dict[str, Any]]] = {}
        for key, entry in self.tensors.items():
            files.setdefault(entry["file"], {})[key] = entry
        return files

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of one `global_step<N>` folder and check that its files are all there and of their size.

        Raises:
            CheckpointError: if it is not a native checkpoint, or a file is missing or has another size.
        """
        manifest = cls.parse(folder)
        for name, size in manifest.files.items():
            check_size(folder / name, size)
        return manifest

    @classmethod
    def parse(cls, folder: Path) -> "Manifest":
        """Read the manifest of one `global_step<N>` folder, and nothing else of it.

        One from before runs had names is a run of its own, named by its checksum.

        Raises:
            CheckpointError: if it is not a native checkpoint, or the manifest is damaged.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            saved = content.pop("checksum", None)
            kind = content.pop("format"), content.pop("version")
        except OSError as error:
            if not is_mistake(error):
                raise UnreadError(f"{unreadable(path, error)}; start again when it can be") from None
            raise CheckpointError(f"{folder}: not a native checkpoint, it has no {MANIFEST}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error}); the checkpoint is damaged") from None
        except (AttributeError, KeyError, TypeError):
            kind = None, None
        if kind != (FORMAT, VERSION):
            raise CheckpointError(
                f"{path}: not a {FORMAT} checkpoint of version {VERSION}; use the release that wrote it"
            )
        if saved != _checksum({"format": FORMAT, "version": VERSION} | content):
            raise CheckpointError(f"{path}: damaged, its checksum is not the one it was written with; copy it again")
        content.setdefault("run", saved)
        try:
            content["progress"] = Progress(**content["progress"])
            content["layout"] = Layout(**content["layout"])
            manifest = cls(**content)
            _check_kinds(manifest)
            strange = {entry["file"] for entry in manifest.tensors.values()} - manifest.files.keys()
            strange |= {name for name in manifest.files if not is_inside(name)}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not as this release writes it ({error}); use the release that did"
            ) from None
        if strange:
            raise CheckpointError(f"{path}: names {min(strange)}, which is no file of the checkpoint; copy it again")
        if unseen := manifest.files.keys() - manifest.by_file().keys() - manifest.checksums.keys():
            raise CheckpointError(f"{path}: has no checksum of {min(unseen)}; copy it again")
        return manifest


_KINDS: dict[str, type] = {
    **dict.fromkeys(("schedule", "config", "files", "tensors", "checksums", "environment"), dict),
    **dict.fromkeys(("forward_losses", "lineage"), list),
    **dict.fromkeys(("precision", "run"), str),
}


def _check_kinds(manifest: Manifest) -> None:
    """See that fields hold what readers take them for, whoever has written them.

    Raises:
        KeyError: a tensor is not described.
        TypeError: a field is of another kind.
    """
    for name, kind in _KINDS.items():
        if not isinstance(getattr(manifest, name), kind):
            raise TypeError(f"{name} is no {kind.__name__}")
    progress = manifest.progress
    counts = [progress.iteration, progress.consumed_samples, progress.schedule_step, progress.optimizer_step]
    counts += [*asdict(manifest.layout).values(), manifest.padded_vocab_size, *manifest.files.values()]
    counts += [number for start, end in progress.left_out for number in (start, end)]
    for entry in manifest.tensors.values():
        counts += entry["shape"]
        if not all(isinstance(entry[key], str) for key in ("file", "dtype", "checksum")):
            raise TypeError("a tensor is not described by texts")
    if not all(type(number) is int and number >= 0 for number in counts):
        raise TypeError("a count is no whole number")


def _checksum(content: dict[str, Any]) -> str:
    return checksum(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def check_size(path: Path, size: int) -> None:
    """Compare the size of a file with the manifest's.

    Raises:
        CheckpointError: it is missing, or differs.
    """
    found = path.stat().st_size if path.is_file() else None
    if found is None:
        raise CheckpointError(f"{path}: missing; copy it from where the checkpoint was written")
    if found != size:
        raise CheckpointError(f"{path}: has {found} bytes, the manifest says {size}; copy it again")


def checkpoint_folder(root: Path, iteration: int | None = None) -> Path | None:
    """The folder of a checkpoint: that of `iteration`, or the one `latest` names; None where there is none at all.

    Raises:
        CheckpointError: if `latest` or `iteration` names a folder that is not there, or there are checkpoints and no
            `latest` that could be read.
    """
    tag = latest_name(root) if iteration is None else f"global_step{iteration}"
    there = numbered_folders(root)
    if tag is None and not there:
        return None
    have = listed(path.name for path in there.values())
    if not tag:
        lost = f"{root}: has {have} and no {LATEST}" if tag is None else f"{root / LATEST}: empty; {root} has: {have}"
        raise CheckpointError(f"{lost}; write the name of one into {LATEST}, or set iteration")
    folder = root / tag
    replaced = root / f".{tag}.replaced"
    if not folder.is_dir() and replaced.is_dir():
        return replaced  # a run was killed between the two renames that save an iteration for the second time
    if not folder.is_dir() or folder == root:
        raise CheckpointError(f"{folder}: no such checkpoint; {root} has: {have}")
    return folder


def latest_name(root: Path) -> str | None:
    """What `latest` says; None where there is none.

    Raises:
        CheckpointError: it is a folder, or its text is no name.
        UnreadError: storage does not give it.
    """
    latest = root / LATEST
    try:
        tag = latest.read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if not is_mistake(error):
            raise UnreadError(f"{unreadable(latest, error)}; start again when it can be") from None
        what = "a folder, not a file" if latest.is_dir() else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{latest}: {what}; replace it by a file with the name of a checkpoint") from None
    if not tag.isprintable():
        raise CheckpointError(f"{latest}: damaged, it names no folder; write the name of a checkpoint into it")
    return tag


_NUMBERED = re.compile(r"global_step(\d+)|\.global_step(\d+)\.replaced")


def numbered_folders(root: Path) -> dict[int, Path]:
    """The folders `global_step<N>` in `root` that have something in them, by N, the lowest first.

    One that is only there as `.replaced`, where a run was killed, is among them.
    """
    found: dict[int, Path] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():  # names that begin with a dot come first
        match = _NUMBERED.fullmatch(path.name)
        if match and path.is_dir() and any(path.iterdir()):
            found[int(match[1] or match[2])] = path
    return dict(sorted(found.items()))


def listed(names: Iterable[str]) -> str:
    """Names for a line of text: all, or the first three of many."""
    every = list(names) or ["none"]
    return ", ".join(every) if len(every) <= 4 else f"{', '.join(every[:3])} and {len(every) - 3} more"


def is_native(folder: Path) -> bool:
    """Whether a `global_step<N>` folder is in the native format."""
    return (folder / MANIFEST).is_file()
