"""Every save as a Hugging Face folder too, and what happens where that goes wrong."""

import logging
import random

import pytest
import torch
from checkpoint.exports import llama_tokenizer, random_run, same_weights
from model_families import GQA
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING
from transformers import AutoModelForCausalLM, AutoTokenizer

from neox.checkpoint.conversion import convert, export
from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.conversion.export import Export
from neox.checkpoint.open import open_checkpoint
from neox.config import config_from_dict
from neox.errors import CheckpointError
from neox.training.preflight import prepare


def test_a_comparison_that_does_not_fit_is_left_out_and_said_to_be(tmp_path, monkeypatch):
    config, weights = random_run(**GQA)
    monkeypatch.setattr(convert, "available_bytes", lambda: 100)
    *_, last = export.export(weights, config, tmp_path / "out", Export(save_tokenizer=False))
    assert last.startswith("not compared with transformers: it takes 0.0 GB of memory")
    assert (tmp_path / "out" / "config.json").is_file()
    monkeypatch.setattr(convert, "available_bytes", lambda: None)
    *_, last = export.export(weights, config, tmp_path / "again", Export(save_tokenizer=False))
    assert last.startswith("largest logit difference")


def test_export_beside_warns_where_it_could_not_compare(tmp_path, monkeypatch, caplog):
    config, weights = random_run(**GQA)
    folder = write_native(weights, config, tmp_path / "run")
    monkeypatch.setattr(convert, "available_bytes", lambda: 100)
    with caplog.at_level(logging.WARNING):
        export.export_beside(folder, config)
    assert "hf: not compared with transformers" in caplog.text
    same_weights(open_checkpoint(folder / "hf"), weights)


def test_an_export_draws_from_no_stream_of_the_run(tmp_path):
    """Dropout goes on as if there had been no save."""
    config, weights = random_run(**GQA)
    folder = write_native(weights, config, tmp_path / "run")
    before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
    export.export_beside(folder, config)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.get_default_dtype()) == before[1:]


def train(flat, world_size, break_at=None):
    """Train on this rank, optionally with an export that computes something else from an iteration on."""
    from neox.checkpoint.huggingface.fields import GatedActivation
    from neox.training.run import train as train_run

    torch.set_num_threads(1)
    if break_at is not None:
        written = GatedActivation.write
        saves = []

        def wrong(self, config):
            saves.append(config)
            return written(self, config) | ({"hidden_act": "relu"} if len(saves) >= break_at else {})

        GatedActivation.write = wrong
    try:
        train_run(config_from_dict(flat, world_size=world_size))
    except CheckpointError as error:
        return str(error)
    return ""


LLAMA_RUN = MODEL | TRAINING | ADAMW | GQA | {"rotary_pct": 1.0, "gpt_j_residual": False, "save_hf": True}


def llama_run(tmp_path, corpus, iterations):
    """A run that is saved every second iteration, with a tokenizer of Llama's kind."""
    tokenizer = llama_tokenizer(tmp_path / "own.json")
    return LLAMA_RUN | {
        "save": str(tmp_path / "run"),
        "checkpoint_factor": 2,
        "train_iters": iterations,
        "data_path": corpus,
        "tokenizer_type": tokenizer.tokenizer_type,
        "vocab_file": tokenizer.vocab_file,
    }


def test_every_save_is_a_hugging_face_folder_too(tmp_path, corpus):
    flat = llama_run(tmp_path, corpus, 4) | {"model_parallel_size": 2, "precision": "bfloat16"}
    assert run_ranks(train, 2, flat, 2) == ["", ""]
    for step in ("global_step2", "global_step4"):
        folder = tmp_path / "run" / step
        reader = open_checkpoint(folder)
        same_weights(open_checkpoint(folder / "hf"), reader)
        assert AutoTokenizer.from_pretrained(folder / "hf").eos_token == "</s>"
        iteration = step.removeprefix("global_step")
        assert f"from iteration {iteration} of its training" in (folder / "hf" / "README.md").read_text()
        model = AutoModelForCausalLM.from_pretrained(folder / "hf")
        assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("in_background", [False, True])
def test_an_export_that_computes_something_else_is_no_checkpoint(tmp_path, corpus, in_background):
    flat = llama_run(tmp_path, corpus, 6) | {"async_save": in_background}
    errors = run_ranks(train, 2, flat, 2, 2)
    assert errors[0] == errors[1]
    assert "transformers computes other logits" in errors[0]
    assert "the last checkpoint is untouched" in errors[0]
    assert (tmp_path / "run" / "latest").read_text() == "global_step2"
    assert sorted(path.name for path in (tmp_path / "run").glob("global_step*")) == ["global_step2"]
    assert (tmp_path / "run" / "global_step2" / "hf" / "model.safetensors").is_file()


def test_save_hf_is_refused_before_training_where_no_class_fits(tmp_path, corpus, monkeypatch):
    flat = llama_run(tmp_path, corpus, 4)
    without_class = flat | {"pos_emb": "none"}
    with pytest.raises(CheckpointError, match="pos_emb: none"):
        prepare(config_from_dict(without_class, world_size=1))
    assert prepare(config_from_dict(without_class | {"save_hf": False}, world_size=1))
    assert prepare(config_from_dict(flat, world_size=1))
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="save_hf: needs transformers"):
        prepare(config_from_dict(flat, world_size=1))
