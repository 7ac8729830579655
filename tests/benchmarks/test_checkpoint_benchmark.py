"""The figures of the benchmark of conversions: what a process used, and what is made of it."""

from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints import conversions, copy_seconds, row
from benchmarks.process import Usage, bytes_of, drop_from_cache, run_measured
from benchmarks.shapes import PYTHIA, Shape
from benchmarks.synthetic import BLOCK, SyntheticWeights, largest_tensor
from neox.config import load_config

SIZE = 50 * 10**6
READER = """
from pathlib import Path


def main(arguments):
    content = Path(arguments[0]).read_bytes()
    return 3 if arguments[1:] else sum(content[:1])
"""


def test_a_script_is_measured_in_a_process_of_its_own(tmp_path: Path):
    script, file = tmp_path / "reader.py", tmp_path / "file"
    script.write_text(READER)
    file.write_bytes(bytes(SIZE))
    used = run_measured(str(script), file)
    assert SIZE <= used.read < SIZE + 10**6
    assert 0.95 * SIZE < used.peak - used.start < 1.2 * SIZE
    assert used.cpu > 0
    with pytest.raises(RuntimeError, match="exit status 3"):
        run_measured(str(script), file, "fail")


def test_a_row_of_the_table():
    used = Usage(seconds=20.0, cpu=9.0, start=3 * 10**8, peak=9 * 10**8, read=10**10)
    found = row("a -> b", used, size=10**10, copied=10**9, bound=2 * 10**9)
    assert found["MB/s"] == 500
    assert found["of cp"] == 0.5
    assert (found["peak MB"], found["bound MB"], found["read / size"]) == (900, 2000, 1)


def test_every_conversion_finds_its_source(tmp_path: Path):
    made = {tmp_path / "run"}
    for conversion in conversions(tmp_path, tmp_path / "model.yml"):
        assert conversion.source in made
        assert conversion.target not in made
        made.add(conversion.target)


def test_synthetic_weights_have_the_shapes_of_the_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.synthetic.BLOCK", 1000)
    config = Shape("tiny", layers=2, hidden=32, heads=4, vocabulary=160).config(sequence=16, precision="fp16")
    weights = SyntheticWeights(config)
    tensors = {name: weights.tensor(name) for name in weights.names()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == weights.shapes()
    assert all(tensor.dtype is torch.float16 and tensor.isfinite().all() for tensor in tensors.values())
    first, second = (tensors[f"layers.{i}.mlp.linear1.weight"] for i in (2, 3))
    assert first.float().std() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(first, second)
    assert BLOCK > 10**6


def test_the_shape_is_pythias():
    assert largest_tensor(PYTHIA["6.9B"]) == 50432 * 4096 * 2
    told = load_config([Path(__file__).parents[2] / "configs" / "pythia" / "6.9B.yml"]).model
    ours = PYTHIA["6.9B"].config(sequence=2048).model
    for key in ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size"):
        assert getattr(ours, key) == getattr(told, key)


def test_copying_leaves_nothing(tmp_path: Path):
    (tmp_path / "source" / "deep").mkdir(parents=True)
    (tmp_path / "source" / "deep" / "file").write_bytes(bytes(10**5))
    assert bytes_of(tmp_path / "source") == 10**5
    drop_from_cache(tmp_path / "source")
    assert copy_seconds(tmp_path / "source", tmp_path / "copy") > 0
    assert not (tmp_path / "copy").exists()
