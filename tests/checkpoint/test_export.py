"""Exports: what goes with the weights, the faults of GPT-NeoX's own converter, and the tools."""

import json
import logging

import pytest
import tokenizers
import torch
from golden_models import GOLDENS, read_golden
from model_families import GQA, KEYS, LLAMA
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from scripts_of import run_script
from tokenizers import models, pre_tokenizers
from training.layouts import ADAMW, MODEL, TRAINING, write_corpus
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from weight_sources import RandomWeights

from neox.checkpoint import convert, export
from neox.checkpoint.convert import largest_logit_difference, write_native
from neox.checkpoint.described import open_described
from neox.checkpoint.export import Export
from neox.checkpoint.huggingface import HuggingFaceReader, HuggingFaceWriter, export_huggingface
from neox.checkpoint.huggingface.files import BIN, BIN_INDEX, INDEX
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.tokenizer_files import export_tokenizer
from neox.config import TokenizerConfig, config_from_dict
from neox.errors import CheckpointError

SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "padded_vocab_size": 512,
    "train_micro_batch_size_per_gpu": 1,
    "tokenizer_type": "CharLevelTokenizer",
}
ROUND_TRIPS = {"neox": KEYS["neox"], "llama, all heads": LLAMA, "llama, grouped heads": GQA}


def random_run(**keys):
    config = config_from_dict(SHAPE | keys)
    return config, RandomWeights(config.model)


def exported(folder, dtype=torch.float32, **keys):
    """An export of random weights, the configuration, the weights."""
    config, weights = random_run(**keys)
    export_huggingface(weights, config.model, folder, dtype=dtype)
    return config, weights


def same_weights(reader, weights):
    assert reader.names() == weights.names()
    for name in weights.names():
        assert torch.equal(reader.tensor(name), weights.tensor(name)), name


def llama_tokenizer(path, special=("<unk>", "<s>", "</s>")):
    """A vocabulary of bytes with Llama's special tokens first."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(special))
    backend.save(str(path))
    return TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path))


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


class CountedWeights(RandomWeights):
    """Counts how often each tensor is read."""

    def __init__(self, config):
        super().__init__(config)
        self.reads = dict.fromkeys(self.names(), 0)

    def tensor(self, name):
        self.reads[name] += 1
        return super().tensor(name)


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


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_models_with_experts_are_refused_by_name(tmp_path, kind):
    exported(tmp_path / "out", **GQA)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": kind, "num_local_experts": 8}))
    with pytest.raises(CheckpointError, match=f"model_type is {kind}; only gpt_neox, llama") as raised:
        open_checkpoint(tmp_path / "out")
    assert "\n" not in str(raised.value)


# What goes with the weights.


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
        "data_path": "/home/someone/data/books_text_document",
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
        "| Optimizer | AdamW, learning rate 0.003 |",
        "| Special tokens | bos 0, eos 0, pad 1 |",
    ):
        assert words in card
    assert "/home" not in card
    assert "AutoTokenizer" not in card  # there is none in the folder


# The faults of GPT-NeoX's convert_neox_to_hf.py, as counted in its description.


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
    reader = open_checkpoint(tmp_path / "given", gpt_j_residual=config.model.gpt_j_residual)
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


# The comparison, and save_hf.


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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


LLAMA_RUN = (
    MODEL | TRAINING | ADAMW | GQA | {"rotary_pct": 1.0, "gpt_j_residual": False, "tokenizer_type": "HFTokenizer"}
)


def test_every_save_is_a_hugging_face_folder_too(tmp_path, corpus):
    options = llama_tokenizer(tmp_path / "own.json")
    save = {
        "save": str(tmp_path / "run"),
        "checkpoint_factor": 2,
        "train_iters": 4,
        "data_path": corpus,
        "save_hf": True,
    }
    flat = LLAMA_RUN | save | {"vocab_file": options.vocab_file, "model_parallel_size": 2, "precision": "bfloat16"}
    assert run_ranks(train, 2, flat, 2) == ["", ""]
    for step in ("global_step2", "global_step4"):
        folder = tmp_path / "run" / step
        reader = open_checkpoint(folder)
        same_weights(open_checkpoint(folder / "hf"), reader)
        assert AutoTokenizer.from_pretrained(folder / "hf").eos_token == "</s>"
        assert (
            f"iteration {step.removeprefix('global_step')} of its training" in (folder / "hf" / "README.md").read_text()
        )
        model = AutoModelForCausalLM.from_pretrained(folder / "hf")
        assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("in_background", [False, True])
def test_an_export_that_computes_something_else_is_no_checkpoint(tmp_path, corpus, in_background):
    options = llama_tokenizer(tmp_path / "own.json")
    save = {
        "save": str(tmp_path / "run"),
        "checkpoint_factor": 2,
        "train_iters": 6,
        "data_path": corpus,
        "save_hf": True,
    }
    flat = LLAMA_RUN | save | {"vocab_file": options.vocab_file, "async_save": in_background}
    errors = run_ranks(train, 2, flat, 2, 2)
    assert errors[0] == errors[1]
    assert "transformers computes other logits" in errors[0]
    assert "the last checkpoint is untouched" in errors[0]
    assert (tmp_path / "run" / "latest").read_text() == "global_step2"
    assert sorted(path.name for path in (tmp_path / "run").glob("global_step*")) == ["global_step2"]
    assert (tmp_path / "run" / "global_step2" / "hf" / "model.safetensors").is_file()


def test_save_hf_is_refused_before_training_where_no_class_fits(monkeypatch):
    config, _ = random_run(**KEYS["neox"] | {"pos_emb": "none", "rotary_pct": 1.0})
    with pytest.raises(CheckpointError, match="pos_emb: none"):
        export.check_exportable(config)
    config, _ = random_run(**KEYS["neox"])
    export.check_exportable(config)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="save_hf: needs transformers"):
        export.check_exportable(config)


# The tools.


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
    back = ["--hf_dir", tmp_path / "hf", "--output_dir", tmp_path / "back", "--precision", "bf16"]
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


# The Hub.


class FakeApi:
    """What the tool asks of the Hub."""

    calls: list = []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options.pop("repo_id"), options))
        return type("Commit", (), {"commit_url": "https://hub/commit/1"})()


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    return FakeApi


def test_an_upload_is_listed_and_then_done(tmp_path, capsys, hub):
    exported(tmp_path / "out", **GQA)
    (tmp_path / "out" / ".cache").mkdir()
    (tmp_path / "out" / ".cache" / "junk").write_text("x")
    flags = ["--input_dir", tmp_path / "out", "--repo_id", "lab/model-1.4b"]
    assert run_script("tools/ckpts/upload_to_hub.py", *flags, "--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert {line.split()[-1] for line in said[:-1]} == files
    total = sum((tmp_path / "out" / name).stat().st_size for name in files)
    assert said[-1] == f"would upload 3 files, {total:,} bytes, to lab/model-1.4b (private) at main"
    assert hub.calls == []
    assert (
        run_script("tools/ckpts/upload_to_hub.py", *flags, "--public", "--revision", "step2", "--message", "Two") == 0
    )
    assert capsys.readouterr().out.strip().endswith("at https://hub/commit/1")
    assert [name for name, *_ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert {repo for _, repo, _ in hub.calls} == {"lab/model-1.4b"}
    assert hub.calls[0][2]["private"] is False
    assert hub.calls[2][2] == {
        "folder_path": str(tmp_path / "out"),
        "repo_type": "model",
        "revision": "step2",
        "commit_message": "Two",
        "ignore_patterns": [".*", "**/.*"],
    }


def test_a_folder_that_is_not_whole_is_not_uploaded(tmp_path, capsys, hub):
    config, weights = random_run(**GQA)
    writer = HuggingFaceWriter(config.model, dtype=torch.float32, max_shard_bytes=40_000)
    folder = tmp_path / "out"
    writer.write(weights, folder)
    file = folder / next(iter(writer.files()))
    index = json.loads((folder / INDEX).read_text())
    other = json.loads((folder / INDEX).read_text())
    name = next(iter(other["weight_map"]))
    del other["weight_map"][name]
    whole = file.read_bytes()
    cases = [
        (lambda: file.write_bytes(whole[:-8]), f"{file.name}: damaged"),
        (file.unlink, f"{file.name}: no such file"),
        (lambda: (folder / INDEX).write_text(json.dumps(other)), name),
        (lambda: (folder / "generation_config.json").write_text("{"), "generation_config.json: not valid JSON"),
        (lambda: (folder / "weights.tmp").touch(), "left over from a copy"),
        ((folder / "config.json").unlink, "config.json: no such file"),
    ]
    for damage, message in cases:
        damage()
        assert run_script("tools/ckpts/upload_to_hub.py", "--input_dir", folder, "--repo_id", "lab/model") == 2, message
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        file.write_bytes(whole)
        (folder / INDEX).write_text(json.dumps(index))
        (folder / "generation_config.json").write_text("{}")
        (folder / "weights.tmp").unlink(missing_ok=True)
    for repo in ("model", "lab/", "lab/a b", "lab/model/extra"):
        assert run_script("tools/ckpts/upload_to_hub.py", "--input_dir", folder, "--repo_id", repo) == 2
        assert "give ORGANISATION/NAME" in capsys.readouterr().err
    assert hub.calls == []


def test_what_the_hub_refuses_is_one_line(tmp_path, capsys, hub, monkeypatch):
    from huggingface_hub.errors import HFValidationError

    exported(tmp_path / "out", **GQA)

    def refuse(self, **options):
        raise HFValidationError("Repo id must be\nsomething else")

    monkeypatch.setattr(FakeApi, "upload_folder", refuse)
    assert run_script("tools/ckpts/upload_to_hub.py", "--input_dir", tmp_path / "out", "--repo_id", "lab/model") == 2
    assert "lab/model: the Hub did not take it (Repo id must be something else)\n" in capsys.readouterr().err
