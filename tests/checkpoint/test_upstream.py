import json
import os
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from golden_models import GOLDENS, canonical, read_golden, read_run

from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.unpickle import Placeholder, load_torch_file
from neox.checkpoint.upstream import UpstreamReader
from neox.checkpoint.weights import weight_source
from neox.config import load_config
from neox.errors import CheckpointError
from neox.model.build import build_decoder, meta_decoder
from neox.model.loss import Targets

LAYOUTS = ("seq", "pipe", "seq_tp2", "pipe_tp2", "pipe_pp2_tied")
TP2_MODELS = ("pythia_like", "gpt2_default", "rotary_seqres_untied", "alibi", "llama_gqa", "llama_mha")


def loss_of(model, tokens):
    tokens = torch.tensor(tokens)
    labels = tokens[:, 1:]
    return model(tokens[:, :-1], Targets(labels, torch.full(labels.shape, 1 / labels.numel())))


def write_sequential(folder, by_rank, config=None, **state):
    """Write weights named `sequential.*` as upstream's sequential layout."""
    folder.mkdir(parents=True)
    for rank, weights in enumerate(by_rank):
        torch.save({"module": weights} | state, folder / f"mp_rank_{rank:02d}_model_states.pt")
    write_config(folder, config)


def write_pipeline(folder, by_rank, config=None):
    """Write weights named `sequential.*` as upstream's pipeline layout."""
    folder.mkdir(parents=True)
    for rank, weights in enumerate(by_rank):
        layers = {}
        for name, tensor in weights.items():
            _, index, local = name.split(".", 2)
            layers.setdefault(int(index), {})[local] = tensor
        for index, tensors in layers.items():
            torch.save(tensors, folder / f"layer_{index:02d}-model_{rank:02d}-model_states.pt")
    write_config(folder, config)


def write_config(folder, config):
    if config is not None:
        (folder / "configs").mkdir()
        (folder / "configs" / "model.yml").write_text(json.dumps(config.to_flat()))


def tp2_golden(name):
    """Configuration, arrays, and each rank's weights."""
    parts = [read_golden(GOLDENS / "tp2" / f"{name}.rank{rank}.npz") for rank in (0, 1)]
    return parts[0][0], parts[0][1], [weights for _, _, weights in parts]


def one_golden(name="pythia_like"):
    config, arrays, weights = read_golden(GOLDENS / "logits" / f"{name}.npz")
    return config, arrays, weights


def largest_difference(reader, config, arrays):
    model = build_decoder(config.model, source=weight_source(reader))
    logits = model(torch.from_numpy(arrays["tokens"])).detach().numpy()
    return np.abs(logits - arrays["logits"]).max()


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
    assert reader.optimizer_states().step == 0


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
    summed = open_checkpoint(tmp_path / "global_step1", gpt_j_residual=True).tensor(name)
    assert torch.equal(summed, first + second)
    averaged = open_checkpoint(tmp_path / "global_step1", gpt_j_residual=False).tensor(name)
    assert torch.equal(averaged, (first + second) / 2)


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


ROW_BIASES = ("attention.dense.bias", "mlp.linear2.bias")


def train(name, rates, *, row_bias_factor=1.0):
    """Plain AdamW on a run's batches from its initial weights, with upstream's weight decay."""
    config, record = read_run(name)
    initial = {canonical(key): torch.from_numpy(array) for key, array in np.load(GOLDENS / "seq_init.npz").items()}
    model = build_decoder(config.model, source=lambda key, shape: initial[key])
    factors = [row_bias_factor if key.endswith(ROW_BIASES) else 1.0 for key, _ in model.named_parameters()]
    groups = [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in model.parameters()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for tokens, rate in zip(record["tokens"], rates, strict=True):
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(record["losses"], abs=1e-5)
    return model, optimizer


def test_the_file_of_two_ranks_holds_the_weights_that_training_gives():
    # Each rank updates its own copy of a row-parallel bias, so that their sum takes double steps.
    model, _ = train("seq_tp2", [5e-4, 5e-4, 1e-3], row_bias_factor=2.0)
    reader = open_checkpoint(GOLDENS / "seq_tp2")
    for name, parameter in model.named_parameters():
        assert (reader.tensor(name) - parameter).abs().max() <= 1e-5, name


def test_optimizer_states_are_those_of_the_run():
    _, record = read_run("seq")
    # The first rate is upstream's warmup spike: 0.01 / 0.04.
    model, optimizer = train("seq", [0.25, *record["lr_after_step"][:3]])
    states = open_checkpoint(GOLDENS / "seq").optimizer_states()
    assert states.step == 4
    assert set(states.moments) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            expected, found = optimizer.state[parameter][moment], states.moments[name][moment]
            assert found.abs().max() > 0
            assert (found - expected).norm() <= 1e-3 * expected.norm() + 1e-9, f"{name} {moment}"


def test_fused_adam_counts_steps_on_one_parameter_only(tmp_path):
    shutil.copytree(GOLDENS / "seq", tmp_path / "seq")
    path = tmp_path / "seq" / "global_step4" / "mp_rank_00_model_states.pt"
    state = load_torch_file(path)
    for number in list(state["optimizer"]["state"])[:-1]:
        state["optimizer"]["state"][number]["step"] = 0
    path.unlink()
    torch.save(state, path)
    assert open_checkpoint(tmp_path / "seq").optimizer_states().step == 4


@pytest.mark.parametrize("name", ["pipe", "seq_tp2"])
def test_optimizer_states_of_other_layouts_are_refused(name):
    with pytest.raises(CheckpointError, match="start with a fresh one"):
        open_checkpoint(GOLDENS / name).optimizer_states()


class Command:
    """Runs a shell command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_runs_a_command_is_refused(tmp_path):
    _, _, weights = one_golden()
    witness = tmp_path / "ran"
    write_sequential(tmp_path / "global_step1", [weights], args=Command(f"touch {witness}"))
    with pytest.raises(CheckpointError, match=r"asks for posix\.system.*may be malicious"):
        open_checkpoint(tmp_path / "global_step1")
    assert not witness.exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_objects_of_other_packages_become_inert(tmp_path, monkeypatch, new_format):
    ran = []
    module = types.ModuleType("deepspeed_runtime_stand_in")
    module.__name__ = "deepspeed.runtime.stand_in"
    scaler = type("LossScaler", (), {"__setstate__": lambda self, state: ran.append(state)})
    scaler.__module__ = module.__name__
    module.LossScaler = scaler
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kept = scaler()
    kept.scale = 8.0
    state = {
        "loss_scaler": kept,
        "rng": (np.random.RandomState(0).get_state(), np.float64(0.5), {1, 2}, b"\xff"),
        "tensor": torch.arange(3),
    }
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=new_format)
    loaded = load_torch_file(tmp_path / "state.pt")
    assert ran == []
    assert isinstance(loaded["loss_scaler"], Placeholder)
    assert loaded["loss_scaler"].state == {"scale": 8.0}
    assert np.array_equal(loaded["rng"][0][1], state["rng"][0][1])
    assert loaded["rng"][1:] == (0.5, {1, 2}, b"\xff")
    assert loaded["tensor"].tolist() == [0, 1, 2]


def test_programs_and_damage_are_refused(tmp_path):
    torch.jit.script(torch.nn.Identity()).save(tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_torch_file(tmp_path / "program.pt")
    whole = (GOLDENS / "pipe" / "global_step4" / "layer_02-model_00-model_states.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not readable as a torch file") as raised:
        load_torch_file(tmp_path / "cut.pt")
    assert "\n" not in str(raised.value)


def test_missing_files_are_named(tmp_path):
    shutil.copytree(GOLDENS / "pipe_tp2", tmp_path / "pipe")
    (tmp_path / "pipe" / "global_step3" / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"layer_03-model_01-model_states\.pt: no such file"):
        open_checkpoint(tmp_path / "pipe")
    shutil.copytree(GOLDENS / "seq_tp2", tmp_path / "seq")
    (tmp_path / "seq" / "global_step3" / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="1 tensor ranks and the run had 2"):
        open_checkpoint(tmp_path / "seq")
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
    (tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match="ZeRO 3"):
        open_checkpoint(tmp_path)
