"""What one host says of itself for `neox.launch check`: run on it as `python -m neox.launch.probe REQUEST`.

Answers with one line of JSON. A thing that cannot be found out is an answer too, under "error".
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from neox.results import print_result
from neox.versions import commit, software

ANSWER = "neox-answer "
"""Start of the line that holds the answer; login scripts may print others."""

MARK = ".neox-check-"
"""Start of the names of files that show whether hosts see the same folder."""

GPU_FIELDS = {
    "name": "name",
    "memory_MiB": "memory.total",
    "used_MiB": "memory.used",
    "driver": "driver_version",
    "temperature": "temperature.gpu",
    "uncorrected_errors": "ecc.errors.uncorrected.volatile.total",
    "rows_to_remap": "remapped_rows.pending",
}
"""Our names of what nvidia-smi is asked for."""

_BLOCK = 1 << 20


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Everything that is asked for.

    Args:
        request: `mark` (how to name this host's file), `save` (a folder or None), `write_mb`, `data` (prefixes).
    """
    return {
        "software": software(),
        "commit": commit(),
        "gpus": _attempt(gpus),
        "save": _attempt(partial(_try_folder, request), request["save"]) if request["save"] else None,
        "data": {prefix: _attempt(partial(data_files, prefix)) for prefix in request["data"]},
        "time": time.time(),
    }


def look_again(request: dict[str, Any]) -> dict[str, Any]:
    """Which hosts' marks are in the folder."""
    return {"marks": sorted(path.name.removeprefix(MARK) for path in Path(request["save"]).glob(f"{MARK}*"))}


def tidy(request: dict[str, Any]) -> dict[str, Any]:
    """Remove this host's mark."""
    (Path(request["save"]) / f"{MARK}{request['mark']}").unlink(missing_ok=True)
    return {}


def _attempt(find: Callable[[], Any], where: str = "files") -> Any:
    """What is found, or the error; `where` is for one that names no file, as that of a write."""
    try:
        return find()
    except OSError as error:
        return {"error": f"{error.filename or where}: {(error.strerror or str(error)).lower()}"}
    except (ValueError, subprocess.SubprocessError) as error:
        return {"error": str(error)}


def gpus() -> list[dict[str, str]]:
    """Every GPU of this host, as nvidia-smi tells; empty where it is not installed."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ValueError(f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[0]}")
    lines = [[word.strip() for word in line.split(",")] for line in done.stdout.strip().splitlines()]
    return [dict(zip(GPU_FIELDS, words, strict=True)) for words in lines]


def _try_folder(request: dict[str, Any]) -> dict[str, Any]:
    folder = Path(request["save"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{MARK}{request['mark']}").write_text("")
    return {"free": shutil.disk_usage(folder).free, "rate": write_rate(folder, request["write_mb"] * _BLOCK)}


def write_rate(folder: Path, size: int) -> float:
    """Bytes per second to the disk, by a file of `size` bytes that is flushed (fsync) and removed."""
    path = folder / f".neox-write-{os.getpid()}"
    block = os.urandom(_BLOCK)
    try:
        start = time.monotonic()
        with path.open("wb", buffering=0) as file:
            for _ in range(size // _BLOCK):
                file.write(block)
            os.fsync(file.fileno())
        return size / max(time.monotonic() - start, 1e-9)
    finally:
        path.unlink(missing_ok=True)


def data_files(prefix: str) -> dict[str, Any]:
    """Size of the `.bin` and checksum of the `.idx`, which holds the lengths of all documents."""
    digest = hashlib.sha256()
    with Path(f"{prefix}.idx").open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bin": Path(f"{prefix}.bin").stat().st_size, "idx": digest.hexdigest()[:16]}


def main(argv: list[str]) -> int:
    """Answer the request, a JSON text whose `step` is look, look_again or tidy."""
    request = json.loads(argv[0])
    steps = {"look": look, "look_again": look_again, "tidy": tidy}
    answer = _attempt(partial(steps[request["step"]], request))
    print_result(ANSWER + json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
