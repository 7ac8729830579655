"""Saying once what many ranks have to say."""

import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 600
"""For which the same is no news; it is again before twice as many have passed."""


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
        """Whether nobody said it within the last SECONDS; from now on somebody did."""
        period = int(self._clock() // SECONDS)
        name = hashlib.sha256(re.sub(r"[0-9]+", "0", text).encode()).hexdigest()[:32]
        try:
            if (self._folder / str(period - 1) / name).exists():  # by a rank whose clock stood just before the turn
                return False
            self._begin(period)
            (self._folder / str(period) / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def forget(self) -> None:
        """Remove the files, where the run ends."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, period: int) -> None:
        """Make the folder of a period; whoever does removes those that no longer count."""
        with contextlib.suppress(FileExistsError):
            (self._folder / str(period)).mkdir(parents=True)
            for earlier in self._folder.iterdir():
                if earlier.name.isdigit() and int(earlier.name) < period - 1:
                    shutil.rmtree(earlier, ignore_errors=True)
