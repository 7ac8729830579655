"""Whether a checkpoint is what was written: every byte of it against the manifest's checksums."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neox.checkpoint.native.manifest import Manifest, check_size
from neox.checkpoint.native.store import Team, checked_tensor, open_tensor_file
from neox.checkpoint.storage.tensor_file import checksum
from neox.errors import CheckpointError, UnreadError

Report = Callable[[str, int], None]


def damages(folder: Path, *, share: tuple[int, int] = (0, 1), each: Report | None = None) -> list[str]:
    """Read a native checkpoint and compare it with its manifest.

    Args:
        folder: a `global_step<N>` folder.
        share: (i, n) reads the i-th of n parts, about equal in bytes; the manifest itself is read for each.
        each: called with the file's name and the number of bytes, whenever so many more have been compared.

    Returns:
        A line for each file or tensor that is missing or not as it was written, which it names.

    Raises:
        UnreadError: storage does not give a file, which says nothing of what is in it.
    """
    try:
        manifest = Manifest.parse(folder)
    except UnreadError:
        raise
    except CheckpointError as error:
        return [str(error)]
    found: list[str] = []
    by_file = manifest.by_file()
    for name in _part(manifest.files, *share):
        try:
            check_size(folder / name, manifest.files[name])
            if name in by_file:
                found += _tensor_damages(folder, name, by_file[name], each or _unseen)
            else:
                found += _file_damages(folder, name, manifest.checksums[name], each or _unseen)
        except UnreadError:
            raise
        except CheckpointError as error:
            found.append(str(error))
        except OSError as error:
            found.append(f"{folder / name}: cannot be read ({error.strerror}); copy it again")
    return found


def quick_damages(folder: Path) -> list[str]:
    """What can be seen of a native checkpoint without reading its tensors: the manifest, and the size of each file."""
    try:
        manifest = Manifest.parse(folder)
    except UnreadError:
        raise
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, size in manifest.files.items():
        try:
            check_size(folder / name, size)
        except CheckpointError as error:
            found.append(str(error))
    return found


def team_damages(folder: Path, team: Team) -> list[str]:
    """`damages`, each rank reading its share of the files; every rank gets the same lines, or the same error."""
    mine, unread = [], ""
    try:
        mine = damages(folder, share=(team.rank, team.size))
    except UnreadError as error:
        unread = str(error)
    found = team.gather((mine, unread))
    for _, text in found:
        if text:
            raise UnreadError(text)
    return list(dict.fromkeys(line for lines, _ in found for line in lines))


def _part(files: dict[str, int], index: int, parts: int) -> list[str]:
    """Deal the files, the largest first, each to the part that has least so far."""
    sizes, mine = [0] * parts, []
    for name in sorted(files, key=lambda name: (-files[name], name)):
        least = sizes.index(min(sizes))
        sizes[least] += files[name]
        if least == index:
            mine.append(name)
    return mine


def _tensor_damages(folder: Path, name: str, tensors: Mapping[str, Mapping[str, Any]], each: Report) -> list[str]:
    file = open_tensor_file(folder / name, tensors)
    found = []
    for key, entry in file.entries.items():
        try:
            checked_tensor(file, key, tensors[key]["checksum"])
        except UnreadError:
            raise
        except CheckpointError as error:
            found.append(str(error))
        each(name, entry.end - entry.begin)
    return found


def _file_damages(folder: Path, name: str, expected: str, each: Report) -> list[str]:
    path = folder / name
    content = path.read_bytes()
    each(name, len(content))
    return [] if checksum(content) == expected else [f"{path}: damaged, it is not what was written; copy it again"]


def _unseen(name: str, count: int) -> None:
    """Where nobody watches."""
