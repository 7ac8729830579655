"""What goes into an export beside the weights, and what is read back."""

import json

import pytest
import torch
from checkpoint.exports import ROUND_TRIPS, SHAPE, CountedWeights, exported, llama_tokenizer, random_run, same_weights
from golden_models import GOLDENS
from model_families import GQA
from safetensors.torch import load_file, save_file
from scripts_of import run_script
from training.layouts import ADAMW
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from neox.checkpoint.conversion import export
from neox.checkpoint.conversion.convert import write_native
from neox.checkpoint.conversion.export import Export
from neox.checkpoint.described import open_described
from neox.checkpoint.huggingface import HuggingFaceReader, HuggingFaceWriter, export_huggingface
from neox.checkpoint.huggingface.files import BIN, BIN_INDEX
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.tokenizer_files import export_tokenizer, special_tokens
from neox.config import TokenizerConfig, config_from_dict
from neox.data.tokenizers.fast import hf_tokenizer
from neox.errors import CheckpointError, UserError
from neox.inference.loading import load_model
from neox.model.build import SINGLE


@pytest.mark.parametrize("model", ROUND_TRIPS)
def test_native_to_hugging_face_to_native_is_the_identity(tmp_path, model):
    config, weights = random_run(**ROUND_TRIPS[model])
    write_native(weights, config, tmp_path / "run")
    native, described = open_described(tmp_path / "run")
    lines = list(export.export(native, described, tmp_path / "hf", Export(save_tokenizer=False)))
    assert float(lines[-1].rpartition(":")[2]) <= 1e-5
    assert (
        run_script("tools/ckpts/convert_hf_to_neox.py", "--hf_dir", tmp_path / "hf", "--output_dir", tmp_path / "b")
        == 0
    )
    same_weights(open_checkpoint(tmp_path / "b"), weights)


def test_each_tensor_is_read_once_though_it_becomes_three(tmp_path):
    config, _ = random_run(**GQA)
    weights = CountedWeights(config.model)
    writer = HuggingFaceWriter(config.model, dtype=torch.float32, max_shard_bytes=40_000)
    writer.write(weights, tmp_path / "out")
    assert weights.reads == dict.fromkeys(weights.names(), 1)
    sizes = {file: sum(t.nbytes for t in load_file(tmp_path / "out" / file).values()) for file in writer.files()}
    assert sizes == writer.files()
    assert len(sizes) > 2


def as_pickles(folder, target, parts):
    """The same model in `parts` files of torch.save."""
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    tensors = list(load_file(folder / "model.safetensors").items())
    if parts == 1:
        torch.save(dict(tensors), target / BIN)
        return
    entries = {}
    for number in range(parts):
        file = f"pytorch_model-{number + 1:05d}-of-{parts:05d}.bin"
        torch.save(dict(tensors[number::parts]), target / file)
        entries |= {name: file for name, _ in tensors[number::parts]}
    (target / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": entries}))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("model", ROUND_TRIPS)
def test_pickled_weights_are_read_in_one_file_or_several(tmp_path, model, parts):
    _, weights = exported(tmp_path / "out", **ROUND_TRIPS[model])
    as_pickles(tmp_path / "out", tmp_path / "old", parts)
    same_weights(open_checkpoint(tmp_path / "old"), weights)


def test_tensors_that_do_not_belong_are_refused_by_name(tmp_path):
    _, weights = exported(tmp_path / "out", **GQA)
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    norm = "model.layers.1.self_attn.q_norm.weight"
    save_file(tensors | {norm: torch.ones(8)}, path)
    with pytest.raises(CheckpointError, match=f"holds {norm}, which a LlamaForCausalLM of its config.json does not"):
        open_checkpoint(tmp_path / "out").tensor(weights.names()[0])
    save_file(tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)
    same_weights(open_checkpoint(tmp_path / "out"), weights)
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {name: torch.ones(8, 32)}, path)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[8, 32\], the configuration asks for \[16, 32\]"):
        HuggingFaceReader(tmp_path / "out").check_files()


@pytest.mark.parametrize("kind", ["qwen2_moe", "olmoe"])
def test_models_with_experts_are_refused_by_name(tmp_path, kind):
    exported(tmp_path / "out", **GQA)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind, "num_local_experts": 8}))
    with pytest.raises(CheckpointError, match=f"model_type is {kind}; only gpt_neox, llama") as raised:
        open_checkpoint(tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_before_json_is_dropped(tmp_path):
    options = llama_tokenizer(tmp_path / "own.json")
    made = export_tokenizer(options, model_max_length=24)
    config, weights = random_run(**GQA)
    export_huggingface(weights, config.model, tmp_path / "out", dtype=torch.float32, tokenizer=made)
    whole = open_checkpoint(tmp_path / "out").config_keys()
    for path in (tmp_path / "own.json", *(tmp_path / "out").glob("*.json")):
        path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert open_checkpoint(tmp_path / "out").config_keys() == whole
    assert export_tokenizer(options, model_max_length=24) == made
    again = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "out" / "tokenizer.json"))
    assert export_tokenizer(again, model_max_length=24).files == made.files


def test_a_padding_token_beyond_the_vocabulary_is_refused(tmp_path):
    config, weights = random_run(**GQA)
    asked = Export(save_tokenizer=False, pad_token_id=config.model.padded_vocab_size)
    with pytest.raises(CheckpointError, match=r"--pad-token-id \d+: not below the \d+ rows of the vocabulary"):
        list(export.export(weights, config, tmp_path / "out", asked))


def test_a_padding_token_is_kept_where_the_tokenizer_is_not_at_hand(tmp_path, caplog):
    config, weights = random_run(**GQA, tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "gone.json"))
    asked = Export(save_tokenizer=False, check=False, pad_token_id=3)
    list(export.export(weights, config, tmp_path / "out", asked))
    assert "config.json names no tokens that begin or end a text: " in caplog.text
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (content["eos_token_id"], content["pad_token_id"]) == (None, 3)


def test_special_tokens_are_the_tokenizers(tmp_path):
    options = llama_tokenizer(tmp_path / "own.json")
    made = export_tokenizer(options, model_max_length=24)
    assert made.token_ids == {"bos_token_id": 1, "eos_token_id": 2}
    config, weights = random_run(**GQA)
    export_huggingface(weights, config.model, tmp_path / "out", dtype=torch.float32, tokenizer=made)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token, theirs.eos_token, theirs.bos_token_id, theirs.eos_token_id) == ("<s>", "</s>", 1, 2)
    read = AutoConfig.from_pretrained(tmp_path / "out")
    assert (read.bos_token_id, read.eos_token_id) == (1, 2)
    # The tokenizer of an imported model is the one that came with it, settings and all.
    (tmp_path / "out" / "chat_template.jinja").write_text("{{ messages }}")
    again = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tmp_path / "out" / "tokenizer.json"))
    copied = export_tokenizer(again, model_max_length=99)
    assert copied.token_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert set(copied.files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    # One that names no end has the one that its documents ended with.
    (tmp_path / "out" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert export_tokenizer(again, model_max_length=24).token_ids["eos_token_id"] == 2


def test_generation_takes_the_likeliest_token_until_the_end(tmp_path):
    config, weights = random_run(**GQA)
    tokenizer = export_tokenizer(llama_tokenizer(tmp_path / "own.json"), model_max_length=24)
    export_huggingface(weights, config.model, tmp_path / "out", dtype=torch.float32, tokenizer=tokenizer)
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.do_sample, settings.bos_token_id, settings.eos_token_id) == (False, 1, 2)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "do_sample": False,
    }


def test_the_model_card_says_what_is_known_and_nothing_else(tmp_path):
    keys = GQA | {
        "data_path": "somewhere/inside/books_text_document",
        "optimizer": ADAMW["optimizer"],
        "train_iters": 50,
    }
    config, weights = random_run(**keys)
    write_native(weights, config, tmp_path / "run")
    flags = [
        "--input_dir",
        tmp_path / "run",
        "--output_dir",
        tmp_path / "my-model",
        "--no_save_tokenizer",
        "--no-check",
    ]
    assert run_script("tools/ckpts/convert_neox_to_hf.py", *flags) == 0
    card = (tmp_path / "my-model" / "README.md").read_text()
    parameters = sum(tensor.numel() for tensor in load_file(tmp_path / "my-model" / "model.safetensors").values())
    for words in (
        "license: unknown",
        "# my-model",
        f"| Parameters | {parameters:,}, ",
        "| Heads | 4 of 8, 2 of keys and values |",
        "| Positions | rotary, 100% of a head, base 10,000 |",
        "| Data | `books_text_document` |",
        "| Optimizer | adamw, learning rate 0.003 |",
        "| Special tokens | bos 0, eos 0, pad 1 |",
    ):
        assert words in card
    assert "somewhere" not in card
    assert "AutoTokenizer" not in card  # there is none in the folder


def test_tools_say_what_they_would_write(tmp_path, capsys):
    config, weights = random_run(**GQA)
    folder = write_native(weights, config, tmp_path / "run")
    flags = ["--input_dir", folder, "--output_dir", tmp_path / "hf", "--no_save_tokenizer"]
    assert run_script("tools/ckpts/convert_neox_to_hf.py", *flags, "--dry-run") == 0
    size = sum(weights.tensor(name).nbytes for name in weights.names())
    said = capsys.readouterr().out
    assert f"{size:,}  model.safetensors\n" in said
    assert "would write" in said
    assert not (tmp_path / "hf").exists()
    assert run_script("tools/ckpts/convert_neox_to_hf.py", *flags) == 0
    assert "as LlamaForCausalLM in fp32\nlargest logit difference" in capsys.readouterr().out
    back = ["--model", tmp_path / "hf", "--model_path", tmp_path / "back", "--tp", "2", "--precision", "bf16"]
    assert run_script("tools/ckpts/convert_hf_to_neox.py", *back, "--dry-run") == 0
    assert f"{size // 2:,}  model-00000-000.safetensors\n" in capsys.readouterr().out
    assert not (tmp_path / "back").exists()
    assert run_script("tools/ckpts/convert_hf_to_neox.py", *back) == 0
    assert open_checkpoint(tmp_path / "back").manifest.precision == "bfloat16"


def test_tools_ask_for_what_a_checkpoint_does_not_say(tmp_path, capsys):
    reader, config = open_described(GOLDENS / "seq")
    (tmp_path / "bare").mkdir()
    for path in reader.folder.glob("*.pt"):
        (tmp_path / "bare" / path.name).write_bytes(path.read_bytes())
    flags = ["--input_dir", tmp_path / "bare", "--output_dir", tmp_path / "hf", "--no_save_tokenizer"]
    assert run_script("tools/ckpts/convert_neox_to_hf.py", *flags) == 2
    said = capsys.readouterr().err
    assert "holds no configuration of its model" in said
    assert said.count("\n") == 1
    (tmp_path / "model.yml").write_text(json.dumps(config.to_flat()))
    assert run_script("tools/ckpts/convert_neox_to_hf.py", *flags, "--config_file", tmp_path / "model.yml") == 0
    same_weights(open_checkpoint(tmp_path / "hf"), reader)
    # A tokenizer that cannot be found is asked for, with the way to do without.
    del flags[-1]
    flags[3] = tmp_path / "other"
    assert run_script("tools/ckpts/convert_neox_to_hf.py", *flags, "--config_file", tmp_path / "model.yml") == 2
    assert "--no_save_tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", b'{"model": '), ("chat_template.jinja", b"caf\xe9"), ("added_tokens.json", b"\xff")],
    ids=["cut", "template", "added"],
)
def test_a_damaged_tokenizer_that_is_to_be_copied_is_named(tmp_path, name, content):
    options = llama_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        export_tokenizer(options, model_max_length=24)


def test_every_token_that_ends_a_text_is_exported(tmp_path):
    """A chat model ends turns and documents; its folder names both, and so does the export of what was made of it."""
    special = ("<|endoftext|>", "<s>", "<|im_end|>")
    (tmp_path / "chat").mkdir()
    options = llama_tokenizer(tmp_path / "chat" / "tokenizer.json", special)
    (tmp_path / "chat" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "bos_token": "<s>"}')
    (tmp_path / "chat" / "generation_config.json").write_text('{"eos_token_id": [2, 7], "do_sample": true}')
    made = export_tokenizer(options, model_max_length=24)
    assert made.token_ids == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert made.ends == (2, 7, 0)
    # Without the files the ids are the same.
    bare = special_tokens(options)
    assert (bare.files, bare.token_ids, bare.ends) == ({}, made.token_ids, made.ends)
    config, weights = random_run(**GQA)
    for name, tokenizer in (("whole", made), ("bare", bare)):
        export_huggingface(weights, config.model, tmp_path / name, dtype=torch.float32, tokenizer=tokenizer)
        assert AutoConfig.from_pretrained(tmp_path / name).eos_token_id == 2
        assert GenerationConfig.from_pretrained(tmp_path / name).eos_token_id == [2, 7, 0]
    assert hf_tokenizer(tmp_path / "whole" / "tokenizer.json").ends == (2, 7, 0)


def test_generation_ends_where_the_folder_of_the_weights_says(tmp_path):
    """Also with a tokenizer from elsewhere."""
    config, weights = random_run(**GQA)
    export_huggingface(weights, config.model, tmp_path / "model", dtype=torch.float32)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    options = llama_tokenizer(tmp_path / "elsewhere.json", ("<|endoftext|>",))
    keys = {"tokenizer_type": "HFTokenizer", "vocab_file": options.vocab_file, "load": str(tmp_path / "model")}
    assert load_model(config_from_dict(SHAPE | GQA | keys), SINGLE)[1].ends == (0, 5, 9)
