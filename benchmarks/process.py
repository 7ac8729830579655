"""What a script of the repository uses of time, memory and disk, measured in a process of its own.

    python benchmarks/process.py REPORT SCRIPT ARGUMENT...

runs the script and writes the figures to the file REPORT.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Usage:
    """What a script used, without the import of its modules.

    Attributes:
        seconds: by the clock.
        cpu: seconds of processors, those of the system included.
        start, peak: resident memory in bytes when all was imported, and at most; mapped files count.
        read: bytes asked of the system in reads, from the page cache or not.
    """

    seconds: float
    cpu: float
    start: int
    peak: int
    read: int


def run_measured(script: str, *arguments: object) -> Usage:
    """Run a script with its arguments and measure it.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "usage.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "process.py"), str(report), script]
        done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT)
        if done.returncode != 0:
            raise RuntimeError(f"{script}: exit status {done.returncode}: {done.stderr.strip()}")
        return Usage(**json.loads(report.read_text(encoding="utf-8")))


def load_script(script: str) -> Any:
    """Import a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forget_peak() -> int:
    """Make what is resident now the most that was; return it, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> int:
    """Resident memory of this process in bytes: now (VmRSS) or at most (VmHWM)."""
    # Not ru_maxrss, which begins with the memory of the process that started this one.
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    assert found, f"/proc/self/status has no {field}"
    return 1024 * int(found[1])


def _measure(script: str, arguments: list[str]) -> Usage:
    sys.path.insert(0, str(ROOT))
    module = load_script(script)
    start, read, clock, cpu = memory("VmRSS"), _read_so_far(), time.perf_counter(), time.process_time()
    status = module.main(arguments)
    seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
    if status:
        sys.exit(status)
    return Usage(seconds=seconds, cpu=cpu, start=start, peak=memory("VmHWM"), read=_read_so_far() - read)


def _read_so_far() -> int:
    found = re.search(r"^rchar: (\d+)", Path("/proc/self/io").read_text(), flags=re.MULTILINE)
    assert found, "/proc/self/io has no rchar"
    return int(found[1])


def drop_from_cache(folder: Path) -> None:
    """Write a folder's files to disk and let the page cache forget them, so that the next reader needs the disk."""
    for path in files_of(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def files_of(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def bytes_of(folder: Path) -> int:
    """Their size together."""
    return sum(path.stat().st_size for path in files_of(folder))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(asdict(_measure(sys.argv[2], sys.argv[3:]))), encoding="utf-8")
