"""Damage of any format is named, and two checkpoints are compared by what they compute."""

import json
import shutil

import numpy as np
import pytest
import torch
from golden_models import GOLDENS, read_run
from scripts_of import run_script
from weight_sources import RandomWeights

from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.huggingface import INDEX, export_huggingface
from neox.checkpoint.inspection.verify import compare_logits, damages_of
from neox.checkpoint.open import open_checkpoint

TOOL = "tools/ckpts/verify_checkpoint.py"


def changed(path, position):
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture
def copies(tmp_path):
    """One model in three formats."""
    config, _ = read_run("pipe_tp2")
    reader = open_checkpoint(GOLDENS / "pipe_tp2")
    write_native(reader, config, tmp_path / "native", max_shard_bytes=40_000)
    export_huggingface(reader, config.model, tmp_path / "hf", dtype=torch.float32, max_shard_bytes=40_000)
    shutil.copytree(GOLDENS / "pipe_tp2", tmp_path / "neox")
    return {"native": tmp_path / "native", "hf": tmp_path / "hf", "neox": tmp_path / "neox"}


def test_whole_checkpoints(copies, capsys):
    for path in (*copies.values(), GOLDENS / "a_neox_pp0" / "ckpt", GOLDENS / "seq_tp2"):
        assert run_script(TOOL, path) == 0
        out, _ = capsys.readouterr()
        assert out.endswith(": whole\n")
        assert out.count("\n") == 1


def test_what_is_for_logits_alone_is_refused_without_them(tmp_path, capsys):
    for flag, value in (
        ("--tokens", "ids.npy"),
        ("--tolerance", "0"),
        ("--config_file", "a.yml"),
        ("--batch_size", "2"),
    ):
        assert run_script(TOOL, tmp_path, flag, value) == 2
        assert f"{flag} is for a comparison of logits; add --logits OTHER" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_say_what_it_is(tmp_path, caplog):
    shutil.copytree(GOLDENS / "seq" / "global_step4", tmp_path / "bare", ignore=shutil.ignore_patterns("configs"))
    assert damages_of(tmp_path / "bare") == []
    assert "does not say what its model is, so no tensor can be found to be missing" in caplog.text


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("native", "global_step0/model-00000-000.safetensors"),
        ("native", "global_step0/manifest.json"),
        ("neox", "global_step3/layer_02-model_01-model_states.pt"),
        ("neox", "global_step3/mp_rank_00_model_states.pt"),
    ],
)
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_one_bit_is_found(copies, capsys, kind, name, place):
    path = copies[kind] / name
    changed(path, int(place * path.stat().st_size))
    assert run_script(TOOL, copies[kind]) == 1
    assert path.name in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["native", "hf", "neox"])
def test_a_file_cut_short_is_found(copies, capsys, kind):
    files = [p for p in sorted(copies[kind].rglob("*")) if p.suffix in (".pt", ".safetensors")]
    for path in files:
        content = path.read_bytes()
        for length in (0, 4, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            assert run_script(TOOL, copies[kind]) == 1
            assert path.name in capsys.readouterr().out
        path.write_bytes(content)
    assert run_script(TOOL, copies[kind]) == 0


@pytest.mark.parametrize("kind", ["native", "hf", "neox"])
def test_a_missing_file_is_found(copies, capsys, kind):
    path = [p for p in sorted(copies[kind].rglob("*")) if p.suffix in (".pt", ".safetensors")][1]
    path.unlink()
    assert run_script(TOOL, copies[kind]) == 1
    assert path.name in capsys.readouterr().out


def test_every_damage_has_its_line(copies):
    files = sorted((copies["neox"] / "global_step3").glob("layer_*"))
    for path in files[:2]:
        path.write_bytes(path.read_bytes()[:-30])
    found = damages_of(copies["neox"] / "global_step3")
    assert len(found) == 2
    assert all(path.name in line for path, line in zip(files, found, strict=False))


def test_a_model_that_its_files_do_not_hold(copies, capsys):
    config = copies["hf"] / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"num_hidden_layers": 3}))
    assert run_script(TOOL, copies["hf"]) == 1
    assert "has no tensor gpt_neox.layers.2.input_layernorm.weight" in capsys.readouterr().out
    config.write_text(json.dumps(content | {"intermediate_size": 64}))
    assert run_script(TOOL, copies["hf"]) == 1
    out = capsys.readouterr().out
    assert "[128, 32]" in out
    assert "[64, 32]" in out
    index = copies["hf"] / INDEX
    entries = json.loads(index.read_text())
    first = next(iter(entries["weight_map"]))
    entries["weight_map"][first + "x"] = entries["weight_map"].pop(first)
    config.write_text(json.dumps(content))
    index.write_text(json.dumps(entries))
    assert run_script(TOOL, copies["hf"]) == 1
    assert f"has no tensor {first}x, and the index says so" in capsys.readouterr().out
    settings = copies["neox"] / "global_step3" / "configs" / "tiny.yml"
    settings.write_text(settings.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    assert run_script(TOOL, copies["neox"]) == 1
    assert "has shape [64, 32], the configuration asks for [64, 64]" in capsys.readouterr().out


def test_logits_of_two_formats_agree(copies, capsys, tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(16).reshape(2, 8))
    for other in ("native", "hf"):
        assert run_script(TOOL, copies["neox"], "--logits", copies[other]) == 0
        assert "largest logit difference 0, " in capsys.readouterr().out
        words = ("--tokens", tmp_path / "ids.npy", "--tolerance", 0)
        assert run_script(TOOL, copies["neox"], "--logits", copies[other], *words) == 0
        assert "the same most likely token at 16 of 16 positions" in capsys.readouterr().out


def test_logits_of_two_models_do_not(copies, tmp_path, capsys):
    config, _ = read_run("pipe_tp2")
    wider = config.model.model_copy(update={"padded_vocab_size": 96})
    export_huggingface(RandomWeights(wider), wider, tmp_path / "other", dtype=torch.float32)
    found = compare_logits(copies["neox"] / "global_step3", tmp_path / "other")
    assert found.difference > 0.1
    assert found.agreeing < found.positions == 32
    assert run_script(TOOL, copies["neox"], "--logits", tmp_path / "other") == 1
    assert run_script(TOOL, copies["neox"], "--logits", tmp_path / "other", "--tolerance", 1e9) == 0
    assert run_script(TOOL, tmp_path / "other", "--logits", copies["neox"], "--dry-run") == 0
    assert capsys.readouterr().out.count("would read") == 2


def test_weights_that_are_no_numbers_do_not_agree(copies, tmp_path):
    config, _ = read_run("pipe_tp2")
    broken = RandomWeights(config.model)
    broken.tensor("layers.5.norm.weight")[3] = torch.nan
    export_huggingface(broken, config.model, tmp_path / "broken", dtype=torch.float32)
    assert compare_logits(copies["neox"] / "global_step3", tmp_path / "broken").difference == float("inf")
    assert run_script(TOOL, copies["neox"], "--logits", tmp_path / "broken", "--tolerance", 1e9) == 1


def test_no_checkpoint_is_status_2(tmp_path, capsys):
    assert run_script(TOOL, tmp_path) == 2
    assert run_script(TOOL, GOLDENS / "seq", "--logits", tmp_path) == 2
    assert run_script(TOOL, GOLDENS / "seq", "--logits", GOLDENS / "seq", "--tokens", tmp_path / "ids.npy") == 2
    assert capsys.readouterr().err.count("\n") == 3
