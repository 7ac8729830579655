"""Logits of checkpoints of any format, one layer at a time."""

import errno
import json
import os
import weakref

import numpy as np
import pytest
import torch
from golden_models import GOLDENS, read_golden
from model_families import KEYS
from scripts_of import run_script
from weight_sources import RandomWeights

import neox.checkpoint.inspection.logits as module
from neox.checkpoint.architecture import model_config_of
from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.described import open_described
from neox.checkpoint.huggingface import export_huggingface
from neox.checkpoint.inspection.logits import streamed_logits
from neox.checkpoint.open import open_checkpoint
from neox.config import config_from_dict
from neox.errors import CheckpointError, DataError
from neox.model.build import build_decoder

TOOL = "tools/ckpts/logits.py"
SIZES = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 40,
    "padded_vocab_size": 96,
    "train_micro_batch_size_per_gpu": 1,
}
IDS = torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(1))


def config_of(family):
    return config_from_dict(SIZES | KEYS[family])


def logits_of(reader, model, tokens, **options):
    return torch.cat(list(streamed_logits(reader, model, tokens, **options)))


def whole_model(weights, model, tokens):
    with torch.no_grad():
        return build_decoder(model, source=weights.weight).eval()(tokens)


@pytest.mark.parametrize("family", KEYS)
def test_layers_one_by_one_give_what_the_whole_model_gives(family):
    model = config_of(family).model
    weights = RandomWeights(model)
    assert torch.equal(logits_of(weights, model, IDS), whole_model(weights, model, IDS))
    apart = [whole_model(weights, model, IDS[row : row + 1]) for row in range(3)]
    assert torch.equal(logits_of(weights, model, IDS, batch_size=1), torch.cat(apart))


def test_gradients_are_on_between_two_batches():
    model = config_of(next(iter(KEYS))).model
    first = next(streamed_logits(RandomWeights(model), model, IDS, batch_size=1))
    assert torch.is_grad_enabled()
    assert not first.requires_grad


@pytest.mark.parametrize("path", sorted((GOLDENS / "logits").glob("*.npz")), ids=lambda path: path.stem)
def test_every_kind_of_layer_gives_the_numbers_of_gpt_neox(path, tmp_path):
    config, arrays, weights = read_golden(path)
    layers = {}
    for name, tensor in weights.items():
        _, index, local = name.split(".", 2)
        layers.setdefault(int(index), {})[local] = tensor
    folder = tmp_path / "global_step1"
    (folder / "configs").mkdir(parents=True)
    for index, tensors in layers.items():
        torch.save(tensors, folder / f"layer_{index:02d}-model_00-model_states.pt")
    (folder / "configs" / "run.yml").write_text(json.dumps(config.to_flat()))
    np.save(tmp_path / "ids.npy", arrays["tokens"])
    assert (
        run_script(TOOL, tmp_path / "global_step1", "--tokens", tmp_path / "ids.npy", "--out", tmp_path / "out.npy")
        == 0
    )
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float32
    reader, told = open_described(folder)
    assert torch.equal(torch.from_numpy(found), logits_of(reader, told.model, torch.from_numpy(arrays["tokens"])))
    if config.model.precision == "fp32":
        assert np.abs(found - arrays["logits"]).max() <= 1e-5


@pytest.mark.parametrize("name", ["a_neox_pp0", "e_llama_gqa"])
def test_trained_checkpoints_give_the_logits_of_gpt_neox(name, tmp_path, capsys):
    arrays = np.load(GOLDENS / name / "logits.npz")
    np.save(tmp_path / "ids.npy", arrays["input_ids"].astype(np.uint16))
    out = tmp_path / "out.npy"
    assert run_script(TOOL, GOLDENS / name / "ckpt", "--tokens", tmp_path / "ids.npy", "--out", out) == 0
    assert np.abs(np.load(out) - arrays["logits"]).max() <= 1e-5
    assert "logits [2, 64, 512] in fp32, 262,144 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["neox", "llama", "opt"])
def test_every_format_says_what_model_it_holds(family, tmp_path):
    config = config_of(family)
    weights = RandomWeights(config.model)
    write_native(weights, config, tmp_path / "native")
    export_huggingface(weights, config.model, tmp_path / "hf", dtype=torch.float32)
    expected = whole_model(weights, config.model, IDS)
    np.save(tmp_path / "ids.npy", IDS.numpy())
    for source in ("native", "hf"):
        out = tmp_path / f"{source}.npy"
        assert run_script(TOOL, tmp_path / source, "--tokens", tmp_path / "ids.npy", "--out", out) == 0
        assert torch.equal(torch.from_numpy(np.load(out)), expected)
        assert model_config_of(open_checkpoint(tmp_path / source)).padded_vocab_size == 96


def test_a_configuration_may_be_given(tmp_path):
    """What residual the run had, which joins biases of two ranks, is read from it too."""
    parts = [read_golden(GOLDENS / "tp2" / f"pythia_like.rank{rank}.npz") for rank in (0, 1)]
    config, arrays, _ = parts[0]
    folder = tmp_path / "global_step1"
    folder.mkdir()
    for rank, (_, _, weights) in enumerate(parts):
        torch.save({"module": weights}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    with pytest.raises(CheckpointError, match="holds no configuration of its model; give the one"):
        open_described(folder)
    (tmp_path / "model.yml").write_text(json.dumps(config.to_flat()))
    reader, given = open_described(folder, [tmp_path / "model.yml"])
    found = logits_of(reader, given.model, torch.from_numpy(arrays["tokens"]))
    assert np.abs(found.numpy() - arrays["logits"]).max() <= 2e-6


def test_one_layer_is_in_memory(monkeypatch):
    model = config_of("neox").model
    alive, build = [], module.build_layer

    def watched(spec, **options):
        assert [layer for layer in alive if layer() is not None] == [], "the layer before is still there"
        layer = build(spec, **options)
        alive.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(module, "build_layer", watched)
    logits_of(RandomWeights(model), model, IDS)
    assert len(alive) == 6


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), dtype=np.float32), "holds float32; token ids are integers"),
        (np.zeros((1, 2, 3), dtype=np.int64), "has shape [1, 2, 3]"),
        (np.zeros((0,), dtype=np.int64), "has shape [0]"),
        (np.array([[1, 96]]), "tokens: 96 is no id of this model; its ids are 0 to 95"),
        (np.array([-1]), "tokens: -1 is no id"),
        (np.zeros((1, 41), dtype=np.int64), "sequences of 41 ids, the model has 40 positions"),
        (np.array([{}], dtype=object), "not a .npy file of numbers"),
    ],
)
def test_tokens_that_do_not_fit_are_one_line(tmp_path, capsys, array, message):
    config = config_of("neox")
    write_native(RandomWeights(config.model), config, tmp_path / "native")
    np.save(tmp_path / "ids.npy", array, allow_pickle=True)
    capsys.readouterr()
    out = tmp_path / "out.npy"
    assert run_script(TOOL, tmp_path / "native", "--tokens", tmp_path / "ids.npy", "--out", out) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_other_mistakes_are_one_line(tmp_path, capsys):
    config = config_of("neox")
    write_native(RandomWeights(config.model), config, tmp_path / "native")
    np.save(tmp_path / "ids.npy", IDS.numpy())
    (tmp_path / "text.npy").write_text("1 2 3")
    np.savez(tmp_path / "several.npz", IDS.numpy())
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    capsys.readouterr()
    for checkpoint, tokens, out, message in (
        ("absent", "ids.npy", "out.npy", "no such folder"),
        ("empty", "ids.npy", "out.npy", "no checkpoint; found nothing"),
        ("native", "absent.npy", "out.npy", f"cannot be read ({os.strerror(errno.ENOENT)})"),
        ("native", "text.npy", "out.npy", "not a .npy file of numbers"),
        ("native", "several.npz", "out.npy", "an archive of several arrays"),
        ("native", "ids.npy", "absent/out.npy", "out.npy: cannot be written"),
        ("native", "ids.npy", "text.npy/out.npy", f"out.npy: cannot be written ({os.strerror(errno.ENOTDIR)})"),
        ("native", "ids.npy", "pipe", "pipe: cannot be written (it is no file)"),
        ("native", "ids.npy", "ids.npy", "ids.npy: is read too, and writing would replace it"),
    ):
        words = [tmp_path / checkpoint, "--tokens", tmp_path / tokens, "--out", tmp_path / out]
        assert run_script(TOOL, *words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    words = [tmp_path / "native", "--tokens", tmp_path / "ids.npy", "--out", tmp_path / "out.npy"]
    assert run_script(TOOL, *words, "--batch_size", 0) == 2
    assert run_script(TOOL, *words, "--dry-run") == 0
    assert "would write" in capsys.readouterr().out
    assert not (tmp_path / "out.npy").exists()
    with pytest.raises(DataError, match="no id"):
        next(streamed_logits(RandomWeights(config.model), config.model, IDS + 96))
