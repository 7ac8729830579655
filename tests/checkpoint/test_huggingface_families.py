"""Llama, Mistral, Falcon, OPT, BLOOM and GPT-2 out to Hugging Face's format and back."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from model_families import GQA, KEYS, LLAMA3_SCALING
from safetensors.torch import load_file, save_file
from weight_sources import RandomWeights

from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.huggingface import INDEX, export_huggingface
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.tokenizer_files import ExportedTokenizer
from neox.config import config_from_dict, load_config
from neox.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]

SHAPE = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "padded_vocab_size": 320,
    "train_micro_batch_size_per_gpu": 1,
}


def model_of(**keys):
    return config_from_dict(SHAPE | keys).model


def script(name):
    """The main function of a script of tools/ckpts."""
    path = ROOT / "tools" / "ckpts" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


PLAIN = {"max_position_embeddings": 42}
FAMILY_VARIANTS = {
    "llama": PLAIN | KEYS["llama"],
    "llama mha with biases": PLAIN
    | GQA
    | {"num_kv_heads": 4, "use_bias_in_attn_linear": True, "use_bias_in_mlp": True},
    "mistral": PLAIN | KEYS["mistral"],
    "mixtral": PLAIN | KEYS["mixtral"],
    "mixtral with a window, noise and more choices": PLAIN
    | KEYS["mixtral"]
    | {"sliding_window_width": 7, "moe_jitter_eps": 0.01, "moe_num_experts": 8, "moe_top_k": 3},
    "falcon 7b": PLAIN | KEYS["falcon"] | {"num_kv_heads": 1, "gpt_j_tied": True},
    "falcon 40b": PLAIN | KEYS["falcon"],
    "opt": PLAIN | KEYS["opt"] | {"seq_length": 40},
    "gpt2": PLAIN | KEYS["gpt2"],
    "bloom": PLAIN | KEYS["bloom"] | {"seq_length": 42},
}


@pytest.mark.parametrize("name", FAMILY_VARIANTS)
def test_every_family_comes_back_as_it_went(tmp_path, name):
    from transformers import AutoConfig

    config = model_of(**FAMILY_VARIANTS[name])
    weights = RandomWeights(config, dtype=torch.bfloat16)
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    exported = ExportedTokenizer({}, tokens)
    export_huggingface(weights, config, tmp_path / "out", dtype=torch.bfloat16, tokenizer=exported)
    assert type(AutoConfig.from_pretrained(tmp_path / "out")).__name__.lower() == f"{name.split()[0]}config"
    reader = open_checkpoint(tmp_path / "out")
    assert reader.family.name == name.split()[0]
    assert all(torch.equal(reader.tensor(key), weights.tensor(key)) for key in weights.names())
    same = reader.model_config.model_dump(exclude={"precision", "seq_length"})
    assert same == config.model_dump(exclude={"precision", "seq_length"})
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: content[key] for key in tokens} == tokens
    if name == "gpt2":  # which has a key of its own for embeddings, 0.1 where it is absent
        assert content["embd_pdrop"] == content["resid_pdrop"] == config.hidden_dropout == 0.0
    # And a sharded export names every one of their tensors once.
    export_huggingface(weights, config, tmp_path / "parts", dtype=torch.float32, max_shard_bytes=30_000)
    assert set(json.loads((tmp_path / "parts" / INDEX).read_text())["weight_map"]) == set(
        load_file(tmp_path / "out" / "model.safetensors")
    )


def test_settings_as_released_files_spell_them(tmp_path):
    """Llama 3.1's config.json of transformers 4, and Mistral's, with values of either era."""
    config = model_of(**PLAIN | KEYS["llama"])
    export_huggingface(RandomWeights(config), config, tmp_path / "out", dtype=torch.float32)
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    assert content["rope_parameters"] == LLAMA3_SCALING | {"rope_theta": 500000.0}
    assert (content["rope_theta"], content["head_dim"]) == (500000.0, 8)
    assert (content["intermediate_size"], content["num_key_value_heads"], content["hidden_act"]) == (72, 2, "silu")
    older = content | {"rope_scaling": LLAMA3_SCALING | {"type": "llama3"}, "torch_dtype": "bfloat16"}
    for key in ("rope_parameters", "dtype", "head_dim", "mlp_bias", "attention_bias"):
        del older[key]
    path.write_text(json.dumps(older))
    reader = open_checkpoint(tmp_path / "out")
    assert reader.model_config.rope_scaling == LLAMA3_SCALING
    assert reader.model_config.rotary_emb_base == 500000
    assert reader.config_keys()["precision"] == "bfloat16"

    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    path.write_text(json.dumps(content | {"rope_scaling": dynamic, "max_position_embeddings": 42}))
    assert open_checkpoint(tmp_path / "out").model_config.rope_scaling == {
        "rope_type": "dynamic",
        "factor": 2.0,
        "original_max_position_embeddings": 42,
    }
    yarn = {"type": "yarn", "factor": 2.0, "finetuned": True}  # as the first models with it, NousResearch's
    path.write_text(json.dumps(content | {"rope_scaling": yarn, "max_position_embeddings": 42}))
    read = open_checkpoint(tmp_path / "out").model_config
    assert read.rope_scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 42}
    path.write_text(json.dumps(content | {"rope_scaling": LLAMA3_SCALING, "max_position_embeddings": 42}))
    assert open_checkpoint(tmp_path / "out").model_config.rope_scaling == LLAMA3_SCALING
    path.write_text(json.dumps(content | {"num_key_value_heads": 3}))
    with pytest.raises(CheckpointError, match=r"config\.json: no model can be built from it: num_kv_heads"):
        open_checkpoint(tmp_path / "out")
    mistral = content | {
        "model_type": "mistral",
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    for window, ours in ((None, None), (4096, 4095)):
        path.write_text(json.dumps(mistral | {"sliding_window": window}))
        assert open_checkpoint(tmp_path / "out").model_config.sliding_window_width == ours


@pytest.mark.parametrize(("name", "size"), [("bloom", "n_embed"), ("gpt2", "n_embd")])
def test_base_models_have_no_prefix_and_older_names_of_sizes(tmp_path, name, size):
    """As bigscience/bloom and openai-community/gpt2 are."""
    config = model_of(**FAMILY_VARIANTS[name])
    weights = RandomWeights(config)
    export_huggingface(weights, config, tmp_path / "out", dtype=torch.float32)
    (tmp_path / "base").mkdir()
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    content[size] = content.pop("hidden_size", None) or content[size]
    (tmp_path / "base" / "config.json").write_text(json.dumps(content))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file(
        {key.removeprefix("transformer."): t for key, t in tensors.items()}, tmp_path / "base" / "model.safetensors"
    )
    reader = open_checkpoint(tmp_path / "base")
    assert all(torch.equal(reader.tensor(key), weights.tensor(key)) for key in weights.names())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (PLAIN | KEYS["llama"] | {"use_qk_layernorm": True}, "use_qk_layernorm: true; Llama has false only"),
        (
            GQA | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 20}},
            "seq_length: 24; Llama stretches dynamic positions",
        ),
        (PLAIN | KEYS["palm"], "activation: swiglu; Falcon has"),
        (PLAIN | KEYS["bloom"] | {"pos_emb": "none"}, "pos_emb: none; Bloom has alibi only"),
    ],
)
def test_a_model_between_the_families_is_refused(tmp_path, keys, message):
    config = model_of(**keys)
    with pytest.raises(CheckpointError, match=message):
        export_huggingface(RandomWeights(config), config, tmp_path / "out", dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_scripts_take_an_architecture_and_refuse_a_mismatch_in_one_line(tmp_path, capsys):
    keys = SHAPE | PLAIN | GQA | {"tokenizer_type": "CharLevelTokenizer", "num_kv_heads": 1}
    (tmp_path / "model.yml").write_text(json.dumps(keys))
    config = load_config([tmp_path / "model.yml"])
    weights = RandomWeights(config.model)
    write_native(weights, config, tmp_path / "run")
    export = script("convert_neox_to_hf.py")
    flags = ["--config_file", str(tmp_path / "model.yml"), "--no_save_tokenizer", "--input_dir", str(tmp_path / "run")]
    for name, architecture in ((None, "Llama"), ("llama", "Llama"), ("mistral", "Mistral")):
        out = tmp_path / f"hf_{name}"
        export(["--output_dir", str(out), *flags, *(["--architecture", name] if name else [])])
        said = capsys.readouterr().out
        assert f"as {architecture}ForCausalLM in fp32" in said
        assert float(said.rpartition(":")[2]) <= 1e-5
    with pytest.raises(
        CheckpointError, match=r"as neox: norm: rmsnorm; GPTNeoX has layernorm only; export it as llama$"
    ):
        export(["--output_dir", str(tmp_path / "no"), *flags, "--architecture", "neox"])
    script("convert_hf_to_neox.py")(["--hf_dir", str(out), "--output_dir", str(tmp_path / "back")])
    back = open_checkpoint(tmp_path / "back")
    assert all(torch.equal(back.tensor(key), weights.tensor(key)) for key in weights.names())
    written = load_config([tmp_path / "back" / "model.yml"]).model
    for key in ("num_kv_heads", "norm", "activation", "mlp_inner_width", "rms_norm_epsilon", "no_weight_tying"):
        assert getattr(written, key) == getattr(config.model, key)
