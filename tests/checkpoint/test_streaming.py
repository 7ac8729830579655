"""Conversions hold a few tensors and never a file: memory does not grow with the model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from neox.checkpoint.storage.tensor_file import TensorFileWriter
from neox.checkpoint.storage.torch_archive import TorchFileWriter

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 4 * 1024 * 1024 * 2
ROOM = 20 * 10**6
"""What the allocator may keep, and buffers of files; a tenth of the checkpoint."""

PROGRAM = """
import json, sys
from pathlib import Path
from benchmarks.checkpoints import conversions
from benchmarks.process import forget_peak, load_script, memory
from benchmarks.shapes import Shape
from benchmarks.synthetic import write_run
from neox.checkpoint.open import open_checkpoint

folder, found = Path(sys.argv[1]), {}
for shape in (Shape("warm", 2, 64, 4, 128), Shape("large", 8, 1024, 16, 4096)):
    root = folder / shape.name
    root.mkdir()
    config_file = write_run(shape, root / "run", tensor_size=2)
    for conversion in conversions(root, config_file):
        main = load_script(conversion.script).main
        start = forget_peak()
        main([str(word) for word in conversion.words])
        found[conversion.name] = memory("VmHWM") - start
start = forget_peak()
reader = open_checkpoint(root / "again")
kept = [reader.tensor(name) for name in reader.names()]
found["all tensors"] = memory("VmHWM") - start
print(json.dumps(found))
"""


def test_no_conversion_holds_more_than_three_tensors(tmp_path):
    """Of 218 MB, the largest tensor 8.4 MB; a first conversion of a tiny model has loaded all code."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, cwd=ROOT)
    finally:
        shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    assert grown.pop("all tensors") > 200 * 10**6, "the measure does not see what is held"
    assert len(grown) == 4
    assert {name: count for name, count in grown.items() if count > 3 * LARGEST + ROOM} == {}


def test_a_large_file_is_sent_to_disk_while_more_is_coming(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *what: told.append(os.fstat(descriptor).st_size))
    tensors = {name: torch.ones(12 * 2**20, dtype=torch.uint8) for name in "abcdefg"}
    with TensorFileWriter(tmp_path / "x.safetensors", {n: (t.dtype, t.shape) for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert [size // 2**20 for size in told] == [36, 72]
    told.clear()
    with TorchFileWriter(tmp_path / "x.pt", {name: tensor.to("meta") for name, tensor in tensors.items()}) as archive:
        archive.write_all(tensors.values())
    assert [size // 2**20 for size in told] == [36, 72]
