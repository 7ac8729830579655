"""Weights in a type that cannot hold them: refused by name wherever they are converted, and nothing is left behind."""

from pathlib import Path

import pytest
import torch
from checkpoint.exports import SHAPE, exported
from model_families import LLAMA
from safetensors.torch import load_file, save_file
from scripts_of import run_script
from weight_sources import RandomWeights

from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.huggingface import export_huggingface
from neox.checkpoint.upstream.write import UpstreamLayout, UpstreamWriter
from neox.config import config_from_dict
from neox.errors import CheckpointError
from neox.model.build import build_decoder, in_dtype

NAME = "layers.2.mlp.linear2.weight"
BEYOND_BF16 = 3.4e38  # fp32 goes to 3.4028e38, bf16 to 3.3895e38
REFUSED = r"holds 100000, and the largest number of float16 is 65504"


def too_large(precision: str = "fp16", value: float = 1e5) -> tuple:
    config = config_from_dict(SHAPE | {"precision": precision, "no_weight_tying": True})
    weights = RandomWeights(config.model)
    weights.tensor(NAME)[0, 0] = value
    return config, weights


@pytest.mark.parametrize(
    ("source", "target", "value", "fits"),
    [
        (torch.float32, torch.float16, 65504.0, True),
        (torch.float32, torch.float16, 65519.0, True),  # rounds down
        (torch.float32, torch.float16, 65520.0, False),
        (torch.float32, torch.float16, -1e5, False),
        (torch.bfloat16, torch.float16, 1e5, False),
        (torch.float64, torch.float32, 1e39, False),
        (torch.float32, torch.bfloat16, 3.38e38, True),
        (torch.float32, torch.bfloat16, BEYOND_BF16, False),
        (torch.bfloat16, torch.float32, 3e38, True),
        (torch.float16, torch.bfloat16, 65504.0, True),
        (torch.float32, torch.float16, float("inf"), True),
        (torch.float32, torch.float16, float("nan"), True),
    ],
)
def test_a_number_beyond_the_type(source: torch.dtype, target: torch.dtype, value: float, fits: bool) -> None:
    weights = torch.ones(3, 2, dtype=source)
    weights[1, 1] = value
    if fits:
        torch.testing.assert_close(in_dtype("w", weights, target), weights.to(target), rtol=0, atol=0, equal_nan=True)
    else:
        with pytest.raises(CheckpointError, match=r"^w: holds "):
            in_dtype("w", weights, target)


def test_a_number_beyond_the_type_beside_infinities() -> None:
    for other in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match=f"^w: {REFUSED}"):
            in_dtype("w", torch.tensor([other, 1e5, 7e4]), torch.float16)
    assert in_dtype("w", torch.empty(0), torch.float16).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_numbers_that_are_no_weights_by_themselves(dtype: torch.dtype) -> None:
    with pytest.raises(CheckpointError, match=f"^w: is of type {str(dtype).removeprefix('torch.')}, .*quantised"):
        in_dtype("w", torch.ones(2).to(dtype), torch.float16)


def test_no_format_is_written_with_infinities(tmp_path: Path) -> None:
    config, weights = too_large()
    sequential, pipeline = (
        UpstreamWriter(weights, config, layout=UpstreamLayout(pipe=pipe), iteration=1) for pipe in (0, 1)
    )
    writers = (
        lambda: sequential.write(tmp_path / "sequential"),
        lambda: pipeline.write(tmp_path / "pipeline"),
        lambda: export_huggingface(weights, config.model, tmp_path / "b", dtype=torch.float16),
        lambda: write_native(weights, config, tmp_path / "c"),
    )
    for write in writers:
        with pytest.raises(CheckpointError, match=rf"({NAME}|transformer\.h\.0\.mlp\.c_proj\.weight): {REFUSED}"):
            write()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and ".incomplete" not in str(path)] == []


@pytest.mark.parametrize(("precision", "value"), [("fp16", 1e5), ("bfloat16", BEYOND_BF16)])
def test_no_model_is_built_with_infinities(precision: str, value: float) -> None:
    """As training, generation and evaluation start."""
    config, weights = too_large(precision, value)
    dtype = {"fp16": torch.float16, "bfloat16": torch.bfloat16}[precision]
    with pytest.raises(CheckpointError, match=rf"^{NAME}: holds "):
        build_decoder(config.model, source=weights.weight, dtype=dtype)
    build_decoder(config.model, source=weights.weight)  # in fp32


def test_an_import_names_the_tensor_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(tmp_path / "hf", **LLAMA)
    path = tmp_path / "hf" / "model.safetensors"
    held = load_file(path)
    held["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(held, path)
    words = ("--hf_dir", tmp_path / "hf", "--output_dir", tmp_path / "out", "--config_file", tmp_path / "model.yml")
    assert run_script("tools/ckpts/convert_hf_to_neox.py", *words, "--precision", "fp16") == 2
    said = capsys.readouterr().err
    assert f"{NAME}: holds 100000" in said
    assert not (tmp_path / "model.yml").exists()
    assert run_script("tools/ckpts/convert_hf_to_neox.py", *words, "--precision", "bf16") == 0
