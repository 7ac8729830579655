"""What is said of a checkpoint of GPT-NeoX's model: by the configuration beside it, or by its tensors alone."""

import json
import logging

import pytest
import torch
from checkpoint.upstream_folders import largest_difference, one_golden, tp2_golden, write_pipeline, write_sequential

from neox.checkpoint.architecture import model_config_of
from neox.checkpoint.described import open_described
from neox.checkpoint.load import read_loaded_model
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.runs import open_run
from neox.config import config_from_dict
from neox.errors import CheckpointError, ConfigError

UNTOLD = (
    "seq_length",
    "rotary_pct",
    "rotary_emb_base",
    "gpt_j_residual",
    "gpt_j_tied",
    "activation",
    "bias_gelu_fusion",
)
EPSILONS = ("layernorm_epsilon", "rms_norm_epsilon", "scalenorm_epsilon", "sliding_window_width", "opt_pos_emb_offset")
ARGUMENTS = {"num_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
LLAMA = {"linear1": ("w3", "w1"), "linear2": ("w2",)}


def as_old_llama(weights):
    """Weights with the MLP of before September 2024, w1 the gate."""
    found = {}
    for name, tensor in weights.items():
        module = next((module for module in LLAMA if module in name), None)
        parts = zip(LLAMA[module], tensor.chunk(len(LLAMA[module])), strict=True) if module else [("", tensor)]
        found |= {name.replace(module, old) if module else name: part.clone() for old, part in parts}
    return found


def difference_of(folder, arrays, config_files=()):
    return largest_difference(*open_described(folder, config_files), arrays)


def loading(folder, **keys):
    flat = {"load": str(folder), "train_micro_batch_size_per_gpu": 1} | keys
    return config_from_dict(flat, read_model=read_loaded_model).model


def test_files_of_the_converters_are_weights_alone(tmp_path):
    """Upstream's convert_raw_llama_weights_to_neox.py leaves an empty optimizer and no sizes in its mp_rank files."""
    _, _, weights = one_golden()
    write_pipeline(tmp_path / "global_step0", [weights])
    state = {"dp_world_size": 1, "mp_world_size": 1, "module": {}, "optimizer": {}, "global_steps": 1, "iteration": 1}
    torch.save(state, tmp_path / "global_step0" / "mp_rank_00_model_states.pt")
    assert open_run(tmp_path / "global_step0") is None
    run = open_run(tmp_path / "global_step0", with_optimizer=False)
    assert (run.manifest.optimizer, run.manifest.progress.iteration) == (None, 1)


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml"])
def test_configurations_of_any_suffix_are_read(tmp_path, suffix):
    config, arrays, weights = one_golden()
    write_sequential(tmp_path / "global_step1", [weights], config)
    saved = tmp_path / "global_step1" / "configs" / "model.yml"
    keys = json.loads(saved.read_text())
    saved.unlink()
    for number, names in enumerate((list(keys)[::2], list(keys)[1::2])):
        path = saved.with_name(f"part{number}").with_suffix(suffix if number else ".yml")
        path.write_text(json.dumps({name.replace("_", "-"): keys[name] for name in names}))
    assert difference_of(tmp_path / "global_step1", arrays) <= 2e-6


def test_bf16_spelt_as_a_type_of_fp16(tmp_path):
    config, _, weights = one_golden()
    write_sequential(tmp_path / "a", [weights], config)
    section = {"enabled": True, "type": "bfloat16", "loss_scale": 0}
    saved = tmp_path / "a" / "configs" / "model.yml"
    keys = {name: value for name, value in json.loads(saved.read_text()).items() if name != "precision"}
    saved.write_text(json.dumps(keys | {"fp16": section}))
    assert model_config_of(open_checkpoint(tmp_path / "a")).precision == "bfloat16"
    saved.write_text(json.dumps(keys | {"fp16": section | {"type": "fp16"}}))
    assert model_config_of(open_checkpoint(tmp_path / "a")).precision == "fp16"


@pytest.mark.parametrize("width", [{}, {"intermediate_size": 42}])
def test_runs_of_the_llama_mlp_say_so_in_their_own_way(tmp_path, width):
    config, arrays, by_rank = tp2_golden("llama_mha")
    write_pipeline(tmp_path / "global_step1", [as_old_llama(weights) for weights in by_rank], config)
    saved = tmp_path / "global_step1" / "configs" / "model.yml"
    keys = json.loads(saved.read_text())
    for key in ("intermediate_size", "use_bias_in_mlp"):
        keys.pop(key, None)
    saved.write_text(json.dumps(keys | {"mlp_type": "llama", "activation": "silu", "norm": "rmsnorm"} | width))
    assert difference_of(tmp_path / "global_step1", arrays) <= 2e-6


@pytest.mark.parametrize(
    "name",
    ["pythia_like", "gpt2_default", "llama_gqa", "llama_mqa", "alibi", "qk_layernorm", "nonparam_ln", "sinusoidal"],
)
def test_tensors_alone_tell_the_shape_of_a_model(tmp_path, name):
    config, _, weights = one_golden(name)
    write_sequential(tmp_path / "global_step1", [weights], args=ARGUMENTS)
    model = config.model
    kept = {key: getattr(model, key) for key in (*UNTOLD, *EPSILONS) if getattr(model, key) is not None}
    if model.pos_emb in ("rotary", "none"):
        kept["pos_emb"] = model.pos_emb
    told = loading(tmp_path / "global_step1", **kept)
    rounding = {"intermediate_size", "mlp_multiple_of"}
    assert told.model_dump(exclude=rounding) == model.model_dump(exclude=rounding)
    assert told.mlp_inner_width == model.mlp_inner_width


def test_a_wrong_configuration_of_bare_weights_is_named_with_both_values(tmp_path):
    _, _, weights = one_golden("pythia_like")
    write_pipeline(tmp_path / "global_step1", [weights])
    wrong = {"num_layers": 3, "no_weight_tying": False, "use_bias_in_mlp": False, "norm": "rmsnorm"}
    right = {"hidden_size": 32, "num_attention_heads": 4, "seq_length": 32, "pos_emb": "rotary"}
    with pytest.raises(ConfigError) as caught:
        loading(tmp_path / "global_step1", **wrong, **right)
    lines = sorted(line.partition("; remove")[0] for line in str(caught.value).splitlines())
    place = tmp_path / "global_step1"
    assert lines == [
        f"no_weight_tying: false is not what {place} has, true",
        f"norm: rmsnorm is not what {place} has, layernorm",
        f"num_layers: 3 is not what {place} has, 2",
        f"use_bias_in_mlp: false is not what {place} has, true",
    ]


def test_a_configuration_that_leaves_out_a_tensor_is_refused(tmp_path):
    config, arrays, weights = one_golden("pythia_like")
    write_pipeline(tmp_path / "global_step1", [weights])
    (tmp_path / "tied.yml").write_text(json.dumps(config.to_flat() | {"no_weight_tying": False}))
    with pytest.raises(CheckpointError, match=r"holds layers\.6\.final_linear\.weight, which the model of the config"):
        open_described(tmp_path / "global_step1", [tmp_path / "tied.yml"])
    # A shared norm leaves one of the two idle, which GPT-NeoX keeps.
    config, arrays, weights = one_golden("gptj_tied")
    write_pipeline(tmp_path / "global_step2", [weights])
    (tmp_path / "shared.yml").write_text(json.dumps(config.to_flat()))
    assert difference_of(tmp_path / "global_step2", arrays, [tmp_path / "shared.yml"]) <= 2e-6


@pytest.mark.parametrize(("kinds", "differs"), [(("scale",), False), (("weight", "bias"), True)])
def test_only_norms_over_the_heads_of_a_rank_give_other_logits(tmp_path, caplog, kinds, differs):
    config, _, by_rank = tp2_golden("llama_mha")
    for weights in by_rank:
        weights |= {f"sequential.2.attention.qk_layernorm.{kind}": torch.ones(2, 8) for kind in kinds}
    write_pipeline(tmp_path / "global_step1", by_rank, config)
    with caplog.at_level(logging.WARNING):
        open_checkpoint(tmp_path / "global_step1")
    assert ("normalises queries and keys over the heads of a rank" in caplog.text) is differs
