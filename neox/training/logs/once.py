"""Saying once what many ranks have to say."""

import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 600
"""After which the same is news again."""


class Once:
    """Whether a rank is the first to say something, among those that see the same folder.

    Texts that differ in numbers only are the same: ranks, times and process ids make no difference. Each is an empty
    file, which one process alone can create. Where the folder cannot be written, everything is said.

    Args:
        folder: for the files. It should be the host's own: what is said of storage that hangs must not wait for it.
        clock: seconds since 1970.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock

    def is_first(self, text: str) -> bool:
        """Whether nobody said it within the last minutes; from now on somebody did."""
        period = str(int(self._clock() // SECONDS))
        name = hashlib.sha256(re.sub(r"[0-9]+", "0", text).encode()).hexdigest()[:32]
        try:
            self._begin(period)
            (self._folder / period / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def forget(self) -> None:
        """Remove the files, where the run ends."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, period: str) -> None:
        """Make the folder of a period; whoever does removes those before it."""
        with contextlib.suppress(FileExistsError):
            (self._folder / period).mkdir(parents=True)
            for earlier in self._folder.iterdir():
                if earlier.name.isdigit() and int(earlier.name) < int(period):
                    shutil.rmtree(earlier, ignore_errors=True)
