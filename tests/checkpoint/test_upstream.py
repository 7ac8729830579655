import json
import shutil

import numpy as np
import pytest
import torch
from checkpoint.upstream_folders import (
    largest_difference,
    loss_of,
    one_golden,
    tp2_golden,
    write_pipeline,
    write_sequential,
)
from golden_models import GOLDENS, canonical, read_run

from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.storage import torch_file
from neox.checkpoint.upstream.reader import Hints, UpstreamReader
from neox.checkpoint.weights import weight_source
from neox.config import load_config
from neox.errors import CheckpointError
from neox.model.build import build_decoder, meta_decoder

LAYOUTS = ("seq", "pipe", "seq_tp2", "pipe_tp2", "pipe_pp2_tied", "zero1_dp2")
TP2_MODELS = ("pythia_like", "gpt2_default", "rotary_seqres_untied", "alibi", "llama_gqa", "llama_mha")


def test_weights_after_training_give_upstreams_logits():
    folder = GOLDENS / "a_neox_pp0"
    reader = open_checkpoint(folder / "ckpt")
    assert reader.folder.name == "global_step5"
    config = load_config([folder / "a_neox_pp0.yml"]).with_vocabulary(reader.padded_vocab_size)
    arrays = np.load(folder / "logits.npz")
    logits = build_decoder(config.model, source=weight_source(reader))(torch.from_numpy(arrays["input_ids"]))
    assert np.abs(logits.detach().numpy() - arrays["logits"]).max() <= 1e-5
    assert reader.iteration == 5
    assert reader.arguments["padded_vocab_size"] == reader.padded_vocab_size == 512


def test_grouped_heads_and_gates_are_read():
    folder = GOLDENS / "e_llama_gqa"
    reader = open_checkpoint(folder / "ckpt")
    config = load_config([folder / "e_llama_gqa.yml"]).with_vocabulary(reader.padded_vocab_size)
    assert reader.shapes()["layers.2.attention.query_key_value.weight"] == (128, 64)
    assert set(reader.names()) == set(dict(meta_decoder(config.model).named_parameters()))
    arrays = np.load(folder / "logits.npz")
    logits = build_decoder(config.model, source=weight_source(reader))(torch.from_numpy(arrays["input_ids"]))
    assert np.abs(logits.detach().numpy() - arrays["logits"]).max() <= 1e-5


def test_initial_weights_give_upstreams_first_loss():
    folder = GOLDENS / "a_neox_pp0"
    reader = open_checkpoint(folder / "ckpt", iteration=0)
    config = load_config([folder / "a_neox_pp0.yml"]).with_vocabulary(512)
    model = build_decoder(config.model, source=weight_source(reader))
    batch = np.load(folder / "train_batches.npz")["microbatch_0"]
    first = json.loads((folder / "loss.json").read_text())["steps"][0]
    assert loss_of(model, batch).item() == pytest.approx(first["lm_loss"], abs=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_whole(name):
    config, record = read_run(name)
    reader = open_checkpoint(GOLDENS / name)
    model = meta_decoder(config.model)
    assert set(reader.names()) == set(dict(model.named_parameters()))
    assert reader.shapes() == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert reader.iteration == len(record["losses"])
    # The recorded loss is from before the last update, which learnt from this very batch.
    trained = build_decoder(config.model, source=weight_source(reader))
    assert loss_of(trained, record["tokens"][-1]).item() < record["losses"][-1] - 0.05


@pytest.mark.parametrize("write", [write_sequential, write_pipeline])
@pytest.mark.parametrize("name", TP2_MODELS)
def test_two_ranks_join_to_the_logits_they_computed_together(tmp_path, name, write):
    config, arrays, by_rank = tp2_golden(name)
    write(tmp_path / "global_step1", by_rank, config)
    assert largest_difference(open_checkpoint(tmp_path / "global_step1"), config, arrays) <= 2e-6


def test_row_biases_follow_the_residual(tmp_path):
    _, _, by_rank = tp2_golden("pythia_like")
    write_pipeline(tmp_path / "global_step1", by_rank)
    name = "layers.2.attention.dense.bias"
    first, second = (weights["sequential.2.attention.dense.bias"] for weights in by_rank)
    assert not torch.equal(first, second)
    with pytest.raises(CheckpointError, match="gpt_j_residual"):
        open_checkpoint(tmp_path / "global_step1").tensor(name)
    summed = open_checkpoint(tmp_path / "global_step1", hints=Hints(gpt_j_residual=True)).tensor(name)
    assert torch.equal(summed, first + second)
    averaged = open_checkpoint(tmp_path / "global_step1", hints=Hints(gpt_j_residual=False)).tensor(name)
    assert torch.equal(averaged, (first + second) / 2)


def test_biases_in_half_precision_are_summed_without_rounding(tmp_path):
    _, _, by_rank = tp2_golden("pythia_like")
    halves = [{name: tensor.half() for name, tensor in weights.items()} for weights in by_rank]
    write_pipeline(tmp_path / "global_step1", halves)
    name = "sequential.2.attention.dense.bias"
    exact = halves[0][name].float() + halves[1][name].float()
    assert not torch.equal(exact, exact.half().float())
    summed = open_checkpoint(tmp_path / "global_step1", hints=Hints(gpt_j_residual=True))
    assert torch.equal(summed.tensor("layers.2.attention.dense.bias"), exact)


def test_drift_between_ranks_is_averaged_and_reported(tmp_path, caplog):
    config, _, by_rank = tp2_golden("pythia_like")
    name = "sequential.2.input_layernorm.weight"
    before = by_rank[0][name].clone()
    by_rank[1][name] = before + 0.5
    write_pipeline(tmp_path / "global_step1", by_rank, config)
    reader = UpstreamReader(tmp_path / "global_step1")
    assert torch.allclose(reader.tensor(canonical(name)), before + 0.25)
    assert reader.drift == {canonical(name): pytest.approx(0.5)}
    assert "input_layernorm.weight differs by 0.5" in caplog.text
    assert reader.tensor("layers.2.input_layernorm.bias").shape == before.shape
    assert len(reader.drift) == 1


def test_names_of_released_checkpoints(tmp_path):
    config, arrays, weights = one_golden()
    old = {
        name.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h"): tensor
        for name, tensor in weights.items()
    }
    for layer in (2, 3):
        old[f"sequential.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(1)
    write_pipeline(tmp_path / "global_step150000", [old])
    reader = open_checkpoint(tmp_path / "global_step150000")
    assert largest_difference(reader, config, arrays) <= 2e-6
    assert reader.iteration == 150000
    assert set(reader.names()) == {canonical(name) for name in weights}


def test_missing_files_are_named(tmp_path):
    shutil.copytree(GOLDENS / "pipe_tp2", tmp_path / "pipe")
    (tmp_path / "pipe" / "global_step3" / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"layer_03-model_01-model_states\.pt: no such file; copy the whole"):
        open_checkpoint(tmp_path / "pipe")
    shutil.copytree(GOLDENS / "seq_tp2", tmp_path / "seq")
    (tmp_path / "seq" / "global_step3" / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"mp_rank_01_model_states\.pt: no such file"):
        open_checkpoint(tmp_path / "seq")
    for path in (GOLDENS / "pipe_tp2" / "global_step3").glob("layer_*-model_00-*"):
        shutil.copy(path, tmp_path / "pipe" / "global_step3")
    for path in (tmp_path / "pipe" / "global_step3").glob("layer_*-model_01-*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="1 tensor ranks and the run had 2"):
        open_checkpoint(tmp_path / "pipe")
    shutil.copytree(GOLDENS / "pipe", tmp_path / "gap")
    (tmp_path / "gap" / "global_step4" / "layer_02-model_00-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="has no layer 2"):
        open_checkpoint(tmp_path / "gap")
    shutil.copytree(GOLDENS / "pipe", tmp_path / "bare")
    for path in (tmp_path / "bare" / "global_step4").glob("layer_*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no layer_\\* files beside it"):
        open_checkpoint(tmp_path / "bare")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequential.2.input_layernorm.gamma": (32,)}, "layer 2 holds input_layernorm.gamma"),
        (
            {"sequential.2.attention.query_key_value.weight": (128, 32)},
            "128 rows, which are no queries",
        ),
        ({"sequential.3.mlp.linear1.weight": (192, 32)}, "192 rows for the 128 columns of linear2"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, change, message):
    _, _, weights = one_golden()
    for name, shape in change.items():
        weights[name] = torch.zeros(shape)
    write_pipeline(tmp_path / "global_step1", [weights])
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "global_step1")


def test_shape_and_name_mistakes_are_one_line():
    reader = open_checkpoint(GOLDENS / "seq")
    with pytest.raises(CheckpointError, match=r"\[64, 32\], the configuration asks for \[64, 48\]"):
        weight_source(reader)("layers.0.word_embeddings.weight", torch.Size((64, 48)))
    with pytest.raises(CheckpointError, match=r"has no tensor layers\.9"):
        weight_source(reader)("layers.9.mlp.linear1.weight", torch.Size((1,)))


def test_open_says_what_it_found(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="found nothing, expected"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"found notes\.txt, expected"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="seq has: global_step4"):
        open_checkpoint(GOLDENS / "seq", iteration=7)
    torch.save({"module": {}, "param_shapes": []}, tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"optim_states\.pt with its weights are missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["seq_tp2", "pipe_tp2", "zero1_dp2"])
def test_every_byte_is_read_once(monkeypatch, name):
    stretches = []
    fill = torch_file._fill
    monkeypatch.setattr(
        torch_file,
        "_fill",
        lambda file, view, offset: stretches.append((file.name, offset, len(view))) or fill(file, view, offset),
    )
    reader = open_checkpoint(GOLDENS / name)
    before = len(stretches)
    sizes = [reader.tensor(key).nbytes for key in reader.names()]
    read = stretches[before:]
    assert sum(size for *_, size in read) >= sum(sizes)
    ends = {}
    for path, offset, size in sorted(read):
        assert offset >= ends.get(path, 0), f"{path} at {offset}"
        ends[path] = offset + size
