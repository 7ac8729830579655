"""The file of metrics."""

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from neox.errors import ConfigError
from neox.patience import is_mistake

log = logging.getLogger(__name__)

MOST_WAITING = 10_000
"""Lines kept in memory while the file cannot be written; the oldest go first."""


class JsonLinesSink:
    """One JSON object a line: `step`, `time` (seconds since 1970), then the metrics.

    Values that JSON lacks are the strings "NaN", "Infinity" and "-Infinity" (as in protobuf's JSON
    mapping), which `float` reads back. A resumed run appends, so a step repeated after a crash occurs
    twice: the later line counts. Lines that cannot be written are kept and come with a later one.
    """

    refusals: ClassVar[tuple[type[Exception], ...]] = (OSError,)

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[str] = deque(maxlen=MOST_WAITING)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append("")
        except OSError as error:
            if is_mistake(error):
                raise ConfigError(f"cannot write {path}: {error.strerror}; change save or log_dir") from error
            log.warning("%s: cannot be written (%s); its lines come later", path, error.strerror)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line, and those that wait; raises what the disk raises."""
        record = {"step": step, "time": time.time()} | {name: _json(value) for name, value in metrics.items()}
        self._waiting.append(json.dumps(record, allow_nan=False) + "\n")
        self._append("".join(self._waiting))
        self._waiting.clear()

    def progress(self, step: int) -> None:
        """Nothing to record."""

    def close(self) -> None:
        """Write what waits."""
        if self._waiting:
            self._append("".join(self._waiting))

    def _append(self, text: str) -> None:
        """Hand text to the system, all of it or nothing.

        The file is opened each time: a folder that was mounted anew is found again, and nothing stays in a buffer.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # by a run that was killed while writing
                text = "\n" + text
            try:
                data = memoryview(text.encode())
                while data:
                    data = data[os.write(descriptor, data) :]
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def _json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
