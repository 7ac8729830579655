"""Folders that are whole or not there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neox.errors import CheckpointError
from neox.files import flush


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Fill a folder under another name; it gets its own when the block ends, with everything in it on disk.

    Where the block fails nothing is left behind.

    Args:
        final: the folder to make; it must not exist, or be empty.

    Raises:
        CheckpointError: `final` has files in it, or cannot be written.
    """
    check_free(final)
    temporary = final.with_name(f".{final.name}.incomplete")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
            flush(path)
        flush(temporary)
        if final.exists():
            final.rmdir()
        temporary.rename(final)
        flush(final.parent)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path) -> None:
    """See that a folder can be made.

    Raises:
        CheckpointError: there is something in its place.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already; name a new folder, or remove it")
