"""With --dry-run the tools say what they would do and leave the disk as it is."""

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from golden_models import GOLDENS, read_run
from scripts_of import ROOT, run_script
from weight_sources import RandomWeights

from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.huggingface import FAMILIES, export_huggingface
from neox.checkpoint.native.manifest import Layout, Manifest, Progress
from neox.checkpoint.native.store import StoredTensor, Team, write_checkpoint
from neox.choices import ARCHITECTURES, TOKENIZER_TYPES
from neox.config import config_from_dict
from neox.config.data import TokenizerConfig

TOOLS = sorted(path.name for path in (ROOT / "tools" / "ckpts").glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One model in every format, its configuration, and tokens."""
    folder = tmp_path_factory.mktemp("dry_run")
    config, _ = read_run("pipe_tp2")
    weights = RandomWeights(config.model)
    write_native(weights, config, folder / "native")
    export_huggingface(weights, config.model, folder / "hf", dtype=torch.float32)
    (folder / "neox").symlink_to(GOLDENS / "pipe_tp2")
    (folder / "model.yml").write_text(json.dumps(config.to_flat()))
    np.save(folder / "ids.npy", np.zeros((2, 8), dtype=np.int64))
    write_adapted(folder / "adapted", config)
    write_llama(folder / "llama")
    return folder


def write_adapted(root, config):
    """A checkpoint with LoRA's factors in one matrix."""
    keys = config.to_flat() | {"lora": {"rank": 2, "targets": ["query_key_value"]}}
    given = config_from_dict(keys, world_size=None)
    weights = RandomWeights(given.model)
    manifest = Manifest(
        progress=Progress(),
        layout=Layout(1, 1, 1, 0),
        padded_vocab_size=weights.padded_vocab_size,
        precision="fp32",
        schedule={},
        optimizer=None,
        config=given.to_flat(),
        files={},
        tensors={},
    )
    factors = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(96, 2)}
    stored = [StoredTensor("model", name, weights.tensor(name)) for name in weights.names()]
    stored += [StoredTensor("model", f"layers.2.attention.query_key_value.{n}", t) for n, t in factors.items()]
    write_checkpoint(root, iteration=0, tensors=iter(stored), manifest=manifest, configs={}, team=Team())


def write_llama(folder):
    """A model of one block as Meta releases it."""
    folder.mkdir()
    params = {"dim": 32, "n_layers": 1, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": 64, "multiple_of": 16}
    (folder / "params.json").write_text(json.dumps(params))
    block = {f"attention.w{kind}.weight": (32, 32) for kind in "qkvo"}
    block |= {
        "feed_forward.w1.weight": (96, 32),
        "feed_forward.w2.weight": (32, 96),
        "feed_forward.w3.weight": (96, 32),
    }
    block |= {"attention_norm.weight": (32,), "ffn_norm.weight": (32,)}
    shapes = {f"layers.0.{name}": shape for name, shape in block.items()}
    shapes |= {"tok_embeddings.weight": (64, 32), "output.weight": (64, 32), "norm.weight": (32,)}
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "consolidated.00.pth")


def arguments(name, folder):
    """What each tool is given; `out` is not there."""
    out = ("--output_dir", folder / "out")
    return {
        "convert_hf_to_neox.py": ("--hf_dir", folder / "hf", *out),
        "convert_neox_to_hf.py": (
            *("--input_dir", folder / "neox", "--config_file", folder / "model.yml", "--no_save_tokenizer"),
            *out,
        ),
        "convert_raw_llama_to_neox.py": ("--input_dir", folder / "llama", *out),
        "inspect_checkpoint.py": (folder / "native", folder / "hf"),
        "logits.py": (folder / "hf", "--tokens", folder / "ids.npy", "--out", folder / "out"),
        "merge_lora.py": ("--input_dir", folder / "adapted", "--config_file", folder / "model.yml", *out),
        "reshard.py": ("--input_dir", folder / "native", "--format", "pipeline", *out),
        "upload_to_hub.py": (folder / "hf", "organisation/model"),
        "verify_checkpoint.py": (folder / "neox", "--logits", folder / "hf"),
    }[name]


def contents(folder):
    """Every file and the time of its last change."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("name", TOOLS)
def test_nothing_is_written(folder, capsys, name):
    before = contents(folder)
    assert run_script(f"tools/ckpts/{name}", *arguments(name, folder), "--dry-run") == 0
    assert "would " in capsys.readouterr().out
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["merge_lora.py", "reshard.py", "convert_hf_to_neox.py", "logits.py"])
def test_what_was_announced_is_what_is_written(folder, capsys, name, tmp_path):
    words = [tmp_path / "out" if word == folder / "out" else word for word in arguments(name, folder)]
    assert run_script(f"tools/ckpts/{name}", *words, "--dry-run") == 0
    announced = capsys.readouterr().out
    assert run_script(f"tools/ckpts/{name}", *words) == 0
    files = [path for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")] if path.is_file()]
    tensors = [path for path in files if path.suffix in (".pt", ".safetensors", "")]
    assert tensors
    named = [path.name for path in tensors if path.name in announced]
    assert named == [path.name for path in tensors if path.name != "latest"]


def test_metas_files_are_opened_as_they_are(folder, capsys, tmp_path):
    out = tmp_path / "logits.npy"
    assert run_script("tools/ckpts/logits.py", folder / "llama", "--tokens", folder / "ids.npy", "--out", out) == 0
    assert np.load(out).shape == (2, 8, 64)
    assert run_script("tools/ckpts/inspect_checkpoint.py", folder / "llama") == 0
    assert "9 tensors, 17,504 parameters" in capsys.readouterr().out
    assert run_script("tools/ckpts/verify_checkpoint.py", folder / "llama") == 0
    damaged = tmp_path / "llama"
    shutil.copytree(folder / "llama", damaged)
    changed = (damaged / "consolidated.00.pth").read_bytes().replace(bytes.fromhex("0000803f") * 9, bytes(36), 1)
    (damaged / "consolidated.00.pth").write_bytes(changed)
    assert run_script("tools/ckpts/verify_checkpoint.py", damaged) == 1
    assert "consolidated.00.pth" in capsys.readouterr().out


def test_names_on_offer_are_those_that_there_are():
    """`neox.choices` has them apart from what they name."""
    assert tuple(FAMILIES) == ARCHITECTURES
    assert get_args(TokenizerConfig.model_fields["tokenizer_type"].annotation) == TOKENIZER_TYPES
