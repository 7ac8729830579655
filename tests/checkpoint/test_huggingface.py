import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from golden_models import GOLDENS, read_run
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from weight_sources import RandomWeights

from neox.checkpoint.conversion.convert import largest_logit_difference, write_native
from neox.checkpoint.huggingface import INDEX, HuggingFaceReader, export_huggingface
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.tokenizer_files import export_tokenizer
from neox.config import TokenizerConfig, config_from_dict, load_config
from neox.data import build_tokenizer
from neox.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]

SHAPE = {
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "padded_vocab_size": 320,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "train_micro_batch_size_per_gpu": 1,
}
TEXT = "def f(x):\n    return x + 1  # größer als zuvor, 12345 mal\n"
VARIANTS = (
    {},
    {"no_weight_tying": False, "gpt_j_residual": False, "rotary_pct": 1.0, "rotary_emb_base": 500},
    {"bias_gelu_fusion": True, "use_bias_in_attn_linear": False, "intermediate_size": 96, "layernorm_epsilon": 1e-4},
)


def model_of(**keys):
    return config_from_dict(SHAPE | keys).model


def script(name):
    """The main function of a script of tools/."""
    path = ROOT / "tools" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A byte-level BPE as one JSON, and as GPT-2's two files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    backend.save(str(folder / "own.json"))
    backend.model.save(str(folder))
    return folder


def tokenizer_options(vocabulary, kind):
    if kind == "HFTokenizer":
        return TokenizerConfig(tokenizer_type=kind, vocab_file=str(vocabulary / "own.json"))
    return TokenizerConfig(
        tokenizer_type=kind, vocab_file=str(vocabulary / "vocab.json"), merge_file=str(vocabulary / "merges.txt")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keys", VARIANTS)
def test_export_then_import_is_the_identity(tmp_path, keys, dtype):
    config = model_of(**keys)
    weights = RandomWeights(config, dtype=dtype)
    export_huggingface(weights, config, tmp_path / "out", dtype=dtype)
    reader = open_checkpoint(tmp_path / "out")
    assert isinstance(reader, HuggingFaceReader)
    assert reader.names() == weights.names()
    assert reader.shapes() == weights.shapes()
    for name in weights.names():
        assert reader.tensor(name).dtype == dtype
        assert torch.equal(reader.tensor(name), weights.tensor(name)), name
    # What the format cannot hold is fixed: dropout is off and training keys are absent on both sides.
    same = reader.model_config.model_dump(exclude={"precision", "expansion_factor"})
    assert same == config.model_dump(exclude={"precision", "expansion_factor"})
    assert reader.config_keys()["precision"] == {"float32": "fp32", "float16": "fp16"}.get(
        str(dtype).removeprefix("torch."), "bfloat16"
    )


def test_large_models_are_written_in_several_files(tmp_path):
    config = model_of()
    weights = RandomWeights(config)
    export_huggingface(weights, config, tmp_path / "out", dtype=torch.float32, max_shard_bytes=30_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 3
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    whole = sum(weights.tensor(name).nbytes for name in weights.names())
    assert index["metadata"]["total_size"] == whole
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 30_000
        assert {name for name, place in index["weight_map"].items() if place == file.name} == set(tensors)
    reader = HuggingFaceReader(tmp_path / "out")
    assert all(torch.equal(reader.tensor(name), weights.tensor(name)) for name in weights.names())
    assert largest_logit_difference(tmp_path / "out", weights, config, dtype=torch.float32) <= 1e-5
    files[1].unlink()
    with pytest.raises(CheckpointError, match=f"{files[1].name}: no such file"):
        [HuggingFaceReader(tmp_path / "out").tensor(name) for name in weights.names()]


@pytest.mark.parametrize("keys", VARIANTS)
def test_transformers_reads_the_settings(tmp_path, keys):
    from transformers import AutoConfig

    config = model_of(**keys)
    export_huggingface(RandomWeights(config), config, tmp_path / "out", dtype=torch.bfloat16)
    theirs = AutoConfig.from_pretrained(tmp_path / "out")
    assert theirs.rope_parameters == {
        "rope_type": "default",
        "rope_theta": config.rotary_emb_base,
        "partial_rotary_factor": config.rotary_pct,
    }
    assert theirs.hidden_act == ("gelu_fast" if config.bias_gelu_fusion else "gelu")
    assert theirs.tie_word_embeddings is not config.no_weight_tying
    assert theirs.use_parallel_residual is config.gpt_j_residual
    assert theirs.attention_bias is config.use_bias_in_attn_linear
    assert theirs.dtype == torch.bfloat16
    # Version 4 reads these instead.
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (content["rotary_pct"], content["rotary_emb_base"]) == (config.rotary_pct, config.rotary_emb_base)
    assert content["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["HFTokenizer", "GPT2BPETokenizer"])
def test_the_exported_tokenizer_is_the_runs(tmp_path, vocabulary, kind):
    from transformers import AutoTokenizer, GenerationConfig

    options = tokenizer_options(vocabulary, kind)
    ours = build_tokenizer(options)
    config = model_of()
    exported = export_tokenizer(options, model_max_length=24)
    export_huggingface(RandomWeights(config), config, tmp_path / "out", dtype=torch.float32, tokenizer=exported)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = TEXT + "<|endoftext|>" + "ein\n\n  Satz"
    assert theirs(text)["input_ids"] == ours.tokenize(text)
    assert theirs.decode(ours.tokenize(text)) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (ours.eod, ours.eod, ours.pad)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (content["eos_token_id"], content["pad_token_id"]) == (ours.eod, ours.pad)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ours.eod
    again = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "out" / "tokenizer.json"))
    copied = export_tokenizer(again, from_huggingface=True, pad_token_id=7, model_max_length=24)
    assert copied.token_ids == {"bos_token_id": ours.eod, "eos_token_id": ours.eod, "pad_token_id": 7}
    assert copied.files["tokenizer.json"] == exported.files["tokenizer.json"]


def test_a_tokenizer_without_that_form_is_refused():
    with pytest.raises(CheckpointError, match=r"CharLevelTokenizer has no tokenizer\.json"):
        export_tokenizer(TokenizerConfig(tokenizer_type="CharLevelTokenizer"), model_max_length=24)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pos_emb": "learned"}, "pos_emb: learned"),
        ({"pos_emb": "none"}, "pos_emb: none"),
        ({"use_bias_in_mlp": False}, "use_bias_in_mlp: false"),
        ({"sliding_window_width": 8}, "sliding_window_width: 8; GPTNeoX has null only"),
        ({"norm": "scalenorm"}, "norm: scalenorm; GPTNeoX has layernorm only"),
    ],
)
def test_what_transformers_cannot_express_is_refused(tmp_path, keys, message):
    config = model_of(**keys)
    with pytest.raises(CheckpointError, match=message):
        export_huggingface(RandomWeights(config), config, tmp_path / "out", dtype=torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_nothing_and_a_full_folder_is_not_touched(tmp_path):
    config = model_of()
    with pytest.raises(CheckpointError, match="the configuration asks for"):
        export_huggingface(RandomWeights(model_of(hidden_size=64)), config, tmp_path / "out", dtype=torch.float32)
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="exists already"):
        export_huggingface(RandomWeights(config), config, tmp_path / "out", dtype=torch.float32)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_folders_of_older_writers_are_read(tmp_path):
    """Version 4's settings, pickled weights, buffers among them, and the head's other name."""
    config = model_of(rotary_pct=0.5, rotary_emb_base=700)
    weights = RandomWeights(config, dtype=torch.float16)
    export_huggingface(weights, config, tmp_path / "new", dtype=torch.float16)
    old = tmp_path / "old"
    old.mkdir()
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    torch.save(tensors, old / "pytorch_model.bin")
    content = json.loads((tmp_path / "new" / "config.json").read_text())
    for key in ("rope_parameters", "dtype", "attention_bias"):
        del content[key]
    (old / "config.json").write_text(json.dumps(content))
    reader = open_checkpoint(old)
    assert reader.model_config.rotary_pct == 0.5
    assert reader.model_config.rotary_emb_base == 700
    assert reader.config_keys()["precision"] == "fp16"
    assert all(torch.equal(reader.tensor(name), weights.tensor(name)) for name in weights.names())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gemma"},
            "model_type is gemma; only gpt_neox, llama, mistral, mixtral, falcon, opt, bloom, gpt2 can be read",
        ),
        ({"hidden_act": "quick_gelu"}, "hidden_act is quick_gelu"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "of type longrope"),
        ({"model_type": "llama"}, "partial_rotary_factor is 0.25; only 1 can be read"),
        (
            {"model_type": "llama", "rope_parameters": {}, "partial_rotary_factor": 0.5},
            "partial_rotary_factor is 0.5; only 1 can be read",
        ),
        ({"model_type": "llama", "rope_parameters": {}, "head_dim": 16}, "head_dim is 16; only .* 8, can be read"),
        ({"model_type": "falcon", "rope_parameters": {}, "alibi": True}, "alibi is True; only False can be read"),
        ({"model_type": "opt", "ffn_dim": 64, "do_layer_norm_before": False}, "do_layer_norm_before is False"),
        ({"hidden_size": None}, "has no hidden_size"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, change, message):
    config = model_of()
    export_huggingface(RandomWeights(config), config, tmp_path / "out", dtype=torch.float32)
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "out")


def test_a_wrong_export_is_found_out(tmp_path):
    config = model_of()
    weights = RandomWeights(config)
    export_huggingface(weights, config, tmp_path / "out", dtype=torch.float32)
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))
    with pytest.raises(CheckpointError, match="computes other logits"):
        largest_logit_difference(tmp_path / "out", weights, config, dtype=torch.float32)


def test_native_checkpoint_from_weights(tmp_path):
    config = config_from_dict(SHAPE | {"precision": "bfloat16"})
    weights = RandomWeights(config.model)
    folder = write_native(weights, config, tmp_path / "run", max_shard_bytes=30_000)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    reader = open_checkpoint(tmp_path / "run")
    assert isinstance(reader, NativeReader)
    assert reader.folder == folder
    assert (reader.manifest.progress.iteration, reader.padded_vocab_size) == (0, 320)
    for name in weights.names():
        assert torch.equal(reader.tensor(name), weights.tensor(name).bfloat16())
    assert config_from_dict(reader.manifest.config).model == config.model


@pytest.mark.parametrize("name", ["seq", "pipe_tp2", "pipe_pp2_tied"])
def test_scripts_export_upstreams_checkpoints_and_import_them_back(tmp_path, capsys, name):
    config, _ = read_run(name)
    given = {**config.to_flat(), "tokenizer_type": "CharLevelTokenizer"}
    (tmp_path / "model.yml").write_text(json.dumps(given))
    flags = ["--config_file", str(tmp_path / "model.yml"), "--no_save_tokenizer"]
    step = next((GOLDENS / name).glob("global_step*"))
    script("ckpts/convert_neox_to_hf.py")(["--input_dir", str(step), "--output_dir", str(tmp_path / "hf"), *flags])
    said = capsys.readouterr().out
    assert float(said.rpartition(":")[2]) <= 1e-5
    script("ckpts/convert_hf_to_neox.py")(["--hf_dir", str(tmp_path / "hf"), "--output_dir", str(tmp_path / "run")])
    source, back = open_checkpoint(step), open_checkpoint(tmp_path / "run")
    assert set(back.names()) == set(source.names())
    assert all(torch.equal(back.tensor(key), source.tensor(key)) for key in source.names())
    written = load_config([tmp_path / "run" / "model.yml"]).model
    for key in ("hidden_size", "rotary_pct", "gpt_j_residual", "no_weight_tying", "bias_gelu_fusion", "precision"):
        assert getattr(written, key) == getattr(config.model, key)
    # And out again, from the native format.
    (tmp_path / "model.yml").write_text((tmp_path / "run" / "model.yml").read_text())
    script("ckpts/convert_neox_to_hf.py")(
        ["--input_dir", str(tmp_path / "run"), "--output_dir", str(tmp_path / "hf2"), "--no-check", *flags]
    )
    assert (tmp_path / "hf2" / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()


def test_a_script_ends_in_one_line_and_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "tools/ckpts/convert_hf_to_neox.py"), "--hf_dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "config.json: no such file" in done.stderr
    assert not (tmp_path / "run").exists()
