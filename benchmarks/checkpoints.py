"""Conversion of checkpoints: memory, speed beside `cp`, and how often each byte is read.

    python benchmarks/checkpoints.py                              Pythia 6.9B in fp16, 45 GB of disk, half an hour
    python benchmarks/checkpoints.py --model 410M --folder /scratch --json checkpoints.json

A checkpoint of random weights in GPT-NeoX's pipeline layout at tensor size 2 is written, and then converted by the
tools of tools/ckpts, each in a process of its own: to Hugging Face, from there to native, back to Hugging Face and back
to GPT-NeoX. Before each conversion `cp -r` copies the same files on the same disk. Both start without the files in the
page cache and end with the copy on the disk. See docs/benchmarks.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.process import Usage, bytes_of, drop_from_cache, files_of, run_measured
from neox.files import flush
from neox.launch.main import script_main

TENSOR_SIZE = 2
ALLOWANCE = 10**9
"""Bytes a conversion may hold beside three of the largest tensor; the interpreter and torch are in it."""


def main(arguments: list[str]) -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="6.9B", metavar="NAME", help="shape of the Pythia suite (default: 6.9B)")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")
    options = parser.parse_args(arguments)

    from benchmarks.measure import table
    from benchmarks.shapes import shapes_named

    (shape,) = shapes_named([options.model])
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="neox-checkpoints-") as folder:
        for row in measure(shape, Path(folder)):
            print(json.dumps(row), flush=True)
            rows.append(row)
    print("\n" + table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Conversion:
    """One run of a tool.

    Attributes:
        name: what becomes what.
        script: the tool.
        source, target: folders.
        words: its arguments.
    """

    name: str
    script: str
    source: Path
    target: Path
    words: tuple[object, ...]


def conversions(folder: Path, config_file: Path) -> list[Conversion]:
    """The conversions of `folder / "run"`, a checkpoint of GPT-NeoX, in an order in which each finds its source."""
    run, native, back, again = (folder / name for name in ("run", "native", "hf", "again"))
    exported = folder / "exported"
    export = ("--config_file", config_file, "--no_save_tokenizer", "--no-check")
    pipeline = ("--format", "pipeline", "--model_parallel_size", TENSOR_SIZE)
    written = ("--config_file", folder / "written.yml")
    return [
        Conversion(name, f"tools/ckpts/{script}.py", source, target, (flag, source, "--output_dir", target, *more))
        for name, script, flag, source, target, more in (
            ("GPT-NeoX -> HF", "convert_neox_to_hf", "--input_dir", run, exported, export),
            ("HF -> native", "convert_hf_to_neox", "--hf_dir", exported, native, written),
            ("native -> HF", "convert_neox_to_hf", "--input_dir", native, back, export),
            ("native -> GPT-NeoX", "reshard", "--input_dir", native, again, pipeline),
        )
    ]


def measure(shape: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Write a checkpoint of random weights below a folder and convert it; give a row for each conversion.

    No more than three copies are on disk at a time.
    """
    from benchmarks.synthetic import largest_tensor, write_run

    todo = conversions(folder, write_run(shape, folder / "run", tensor_size=TENSOR_SIZE))
    while todo:
        conversion = todo.pop(0)
        size, before = bytes_of(conversion.source), copy_seconds(conversion.source, folder / "copy")
        drop_from_cache(conversion.source)
        used = run_measured(conversion.script, *conversion.words)
        after = copy_seconds(conversion.source, folder / "copy")
        copied = 2 * size / (before + after)
        yield row(conversion.name, used, size=size, copied=copied, bound=3 * largest_tensor(shape) + ALLOWANCE)
        for path in {conversion.source, conversion.target} - {later.source for later in todo}:
            shutil.rmtree(path)


def copy_seconds(source: Path, target: Path) -> float:
    """Time `cp -r` from disk to disk; the copy is deleted."""
    drop_from_cache(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for path in files_of(target):
        flush(path)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def row(name: str, used: Usage, *, size: int, copied: float, bound: int) -> dict[str, Any]:
    """The figures of one conversion of `size` bytes."""
    rate = size / used.seconds
    return {
        "": name,
        "GB": size / 1e9,
        "seconds": used.seconds,
        "CPU seconds": used.cpu,
        "MB/s": rate / 1e6,
        "cp MB/s": copied / 1e6,
        "of cp": rate / copied,
        "peak MB": used.peak / 1e6,
        "bound MB": bound / 1e6,
        "read / size": used.read / size,
        "load": os.getloadavg()[0],
    }


if __name__ == "__main__":
    sys.exit(script_main(main))
