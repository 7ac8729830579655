"""Faults that were seen in GPT-NeoX's convert_neox_to_hf.py, one test each."""

import pytest
import torch
from checkpoint.exports import exported, random_run, same_weights
from golden_models import GOLDENS, read_golden
from model_families import GQA, KEYS, LLAMA
from safetensors.torch import load_file
from scripts_of import run_script
from transformers import AutoConfig, AutoModelForCausalLM

from neox.checkpoint.conversion import export
from neox.checkpoint.conversion.convert import largest_logit_difference, write_native
from neox.checkpoint.conversion.export import Export
from neox.checkpoint.described import open_described
from neox.checkpoint.huggingface import HuggingFaceWriter, export_huggingface
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.upstream.reader import Hints
from neox.config import config_from_dict
from neox.errors import CheckpointError


def difference(folder, weights, config, dtype=torch.float32):
    return largest_logit_difference(folder, weights, config.model, dtype=dtype)


@pytest.mark.parametrize(("fused", "name"), [(True, "gelu_fast"), (False, "gelu")])
def test_fault_1_the_tanh_gelu_is_named(tmp_path, fused, name):
    config, weights = exported(tmp_path / "out", **KEYS["neox"], bias_gelu_fusion=fused)
    assert AutoConfig.from_pretrained(tmp_path / "out").hidden_act == name
    assert difference(tmp_path / "out", weights, config) <= 1e-5


def test_fault_2_heads_that_share_no_keys_are_divided_by_head(tmp_path):
    config, weights = exported(tmp_path / "out", **LLAMA)
    assert difference(tmp_path / "out", weights, config) <= 1e-5


@pytest.mark.parametrize("name", ["rotary_seqres_untied", "pythia_like", "llama_mha", "llama_gqa"])
def test_fault_3_biases_of_two_ranks_are_joined_as_they_were_used(tmp_path, name):
    """Weights of two ranks and the logits that GPT-NeoX computed with them."""
    (tmp_path / "given").mkdir()
    for rank in (0, 1):
        config, arrays, weights = read_golden(GOLDENS / "tp2" / f"{name}.rank{rank}.npz")
        torch.save({"module": weights}, tmp_path / "given" / f"mp_rank_{rank:02d}_model_states.pt")
    reader = open_checkpoint(tmp_path / "given", hints=Hints(gpt_j_residual=config.model.gpt_j_residual))
    export_huggingface(reader, config.model, tmp_path / "out", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(arrays["tokens"])).logits
    assert (logits - torch.from_numpy(arrays["logits"])).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("precision", "asked", "dtype"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("fp16", "auto", "float16"),
        ("fp32", "bf16", "bfloat16"),
        ("fp32", "auto", "float32"),
    ],
)
def test_fault_4_the_type_is_the_runs_or_the_one_asked_for(tmp_path, precision, asked, dtype):
    config, weights = random_run(**KEYS["neox"], precision=precision)
    list(export.export(weights, config, tmp_path / "out", Export(precision=asked, save_tokenizer=False)))
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert str(AutoConfig.from_pretrained(tmp_path / "out").dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("name", ["seq", "pipe"])
def test_fault_5_the_layout_is_the_files_and_no_key_is_believed(tmp_path, name):
    reader, config = open_described(GOLDENS / name)
    config = config_from_dict(config.to_flat() | {"pipe_parallel_size": 1 if name == "seq" else 0}, world_size=None)
    export_huggingface(reader, config.model, tmp_path / "out", dtype=torch.float32)
    assert difference(tmp_path / "out", reader, config) <= 1e-5


def test_fault_6_the_head_has_the_name_that_is_read(tmp_path):
    exported(tmp_path / "out", **KEYS["neox"])
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


def test_fault_7_legacy_names_of_llama_are_known(tmp_path):
    config, weights = random_run(**LLAMA)
    write_native(weights, config, tmp_path / "run")
    flags = ["--input_dir", tmp_path / "run", "--output_dir", tmp_path / "old", "--format", "pipeline"]
    assert run_script("tools/ckpts/reshard.py", *flags, "--model_parallel_size", 2, "--legacy_names") == 0
    reader, described = open_described(tmp_path / "old")
    export_huggingface(reader, described.model, tmp_path / "hf", dtype=torch.float32)
    same_weights(open_checkpoint(tmp_path / "hf"), weights)


def test_fault_8_the_inner_width_is_the_one_that_was_built(tmp_path):
    config, weights = exported(tmp_path / "out", **LLAMA | {"intermediate_size": 300, "mlp_multiple_of": 16})
    assert AutoConfig.from_pretrained(tmp_path / "out").intermediate_size == config.model.mlp_inner_width == 112
    assert difference(tmp_path / "out", weights, config) <= 1e-5


@pytest.mark.parametrize("biases", [True, False])
def test_fault_9_biases_of_llama_are_exported_or_absent(tmp_path, biases):
    keys = GQA | {"use_bias_in_attn_linear": biases, "use_bias_in_mlp": not biases}
    config, weights = exported(tmp_path / "out", **keys)
    read = AutoConfig.from_pretrained(tmp_path / "out")
    assert (read.attention_bias, read.mlp_bias) == (biases, not biases)
    assert difference(tmp_path / "out", weights, config) <= 1e-5


@pytest.mark.parametrize("epsilon", [1e-8, 1e-2])
def test_fault_10_the_epsilon_of_the_norm_is_written(tmp_path, epsilon):
    config, weights = exported(tmp_path / "out", **GQA | {"rms_norm_epsilon": epsilon})
    assert AutoConfig.from_pretrained(tmp_path / "out").rms_norm_eps == epsilon
    assert difference(tmp_path / "out", weights, config) <= 1e-5


def test_fault_11_one_norm_for_both_branches_finds_its_class(tmp_path):
    config, weights = exported(tmp_path / "out", **KEYS["falcon"] | {"gpt_j_tied": True})
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "falcon"
    assert difference(tmp_path / "out", weights, config) <= 1e-5
    with pytest.raises(CheckpointError, match="as neox: gpt_j_tied: true; GPTNeoX has false only; export it as falcon"):
        HuggingFaceWriter(config.model, dtype=torch.float32, architecture="neox")


@pytest.mark.parametrize("positions", ["learned", "none", "alibi", "sinusoidal"])
def test_fault_12_positions_are_checked(positions):
    config, _ = random_run(**KEYS["neox"] | {"pos_emb": positions, "rotary_pct": 1.0})
    with pytest.raises(CheckpointError, match=f"as neox: pos_emb: {positions}; GPTNeoX has rotary"):
        HuggingFaceWriter(config.model, dtype=torch.float32, architecture="neox")
