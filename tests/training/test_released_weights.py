"""Training that starts from somebody else's weights: a Hugging Face folder, GPT-NeoX-20B's slim folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from golden_models import GOLDENS, read_golden
from ranks import run_ranks
from scripts_of import fork_script
from training.layouts import ADAMW, TRAINING
from training.test_resume import figures
from weight_sources import RandomWeights

from neox.checkpoint.huggingface import export_huggingface
from neox.checkpoint.load import read_loaded_model
from neox.checkpoint.open import open_checkpoint
from neox.config import Config, config_from_dict
from neox.data import IndexedDatasetWriter
from neox.errors import CheckpointError, ConfigError
from neox.training.origin import load_folder

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "padded_vocab_size": 132,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "gpt_j_residual": True,
    "no_weight_tying": True,
}
RUN = TRAINING | ADAMW | {"train_batch_size": 4, "train_iters": 2, "log_interval": 1, "seq_length": 16}


@pytest.fixture(scope="module")
def few_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of ids below 64, which the smallest of the models has."""
    prefix = tmp_path_factory.mktemp("few") / "few_text_document"
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(20):
            writer.add_document(generator.integers(1, 64, size=50).astype(np.uint16))
    return str(prefix)


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of GPTNeoX's class as transformers keeps it."""
    folder = tmp_path_factory.mktemp("released") / "tiny-pythia"
    model = config_from_dict(MODEL | {"train_micro_batch_size_per_gpu": 1}).model
    export_huggingface(RandomWeights(model), model, folder, dtype=torch.float32)
    return folder


def slim_name(local: str) -> str:
    """As modules were called when GPT-NeoX-20B was released."""
    return local.replace("linear1", "dense_h_to_4h").replace("linear2", "dense_4h_to_h")


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the form of the slim weights: tensor 2, pipeline 4, old names, no optimizer."""
    root = tmp_path_factory.mktemp("slim") / "20B_checkpoints"
    folder = root / "global_step150000"
    folder.mkdir(parents=True)
    config = read_golden(GOLDENS / "tp2" / "pythia_like.rank0.npz")[0]
    for rank in (0, 1):
        weights = read_golden(GOLDENS / "tp2" / f"pythia_like.rank{rank}.npz")[2]
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in weights.items():
            _, index, local = name.split(".", 2)
            layers.setdefault(int(index), {})[slim_name(local)] = tensor
        for index, tensors in layers.items():
            if any(name.startswith("attention") for name in tensors):
                tensors["attention.rotary_emb.inv_freq"] = torch.ones(2)
            torch.save(tensors, folder / f"layer_{index:02d}-model_{rank:02d}-model_states.pt")
    for rank in range(8):
        state = {"module": None, "optimizer": None, "iteration": 150000, "mp_world_size": 8, "dp_world_size": 1}
        torch.save(state, folder / f"mp_rank_{rank:02d}_model_states.pt")
    (root / "latest").write_text("global_step150000")
    (root / "configs").mkdir()
    keys = {key.replace("_", "-"): value for key, value in config.to_flat().items() if key != "padded_vocab_size"}
    (root / "configs" / "20B.yml").write_text(json.dumps(keys | {"pipe-parallel-size": 4, "model-parallel-size": 2}))
    return root


def resolve(flat: dict[str, Any], world_size: int = 1) -> Config:
    return config_from_dict(flat, world_size=world_size, read_model=read_loaded_model)


def train_loaded(flat: dict[str, Any], world_size: int) -> list[str]:
    """What train.py does; returns what it would print."""
    from neox.training.contract import told
    from neox.training.origin import origin_of
    from neox.training.preflight import prepare, remarks
    from neox.training.run import train

    torch.set_num_threads(1)
    config = prepare(resolve(flat, world_size))
    train(config)
    return [*remarks(config), *told(config, origin_of(config))]


def losses(folder: Path) -> list[float]:
    return [value for (_, name), value in sorted(figures(folder).items()) if name == "train/lm_loss"]


LAYOUTS = {
    "one_process": (1, {}),
    "tp2_pp2": (4, {"model_parallel_size": 2, "pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "zero3_dp2": (2, {"zero_optimization": {"stage": 3}}),
}


@pytest.mark.parametrize("source", ["huggingface", "slim"])
def test_released_weights_train_at_any_layout(
    tmp_path: Path, few_tokens: str, source: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(source)
    found = {}
    for name, (world_size, layout) in LAYOUTS.items():
        save = tmp_path / name
        flat = RUN | {"data_path": few_tokens, "load": str(folder), "save": str(save), "checkpoint_factor": 2} | layout
        lines = run_ranks(train_loaded, world_size, flat, world_size)[0]
        found[name] = losses(save)
        assert any("weights only, starting at iteration 0 with a fresh optimizer" in line for line in lines)
        assert (save / "latest").read_text() == "global_step2"
    assert found["tp2_pp2"] == pytest.approx(found["one_process"], abs=1e-4)
    assert found["zero3_dp2"] == pytest.approx(found["one_process"], abs=1e-4)
    saved = open_checkpoint(tmp_path / "one_process")
    trained, released = saved.tensor("layers.2.mlp.linear1.weight"), open_checkpoint(folder)
    # Two small steps away from the released weights, and from nowhere else.
    assert 0 < (trained - released.tensor("layers.2.mlp.linear1.weight")).abs().max() < 0.02


def test_absent_keys_are_the_checkpoints(huggingface: Path, slim: Path) -> None:
    config = resolve(RUN | {"load": str(huggingface)})
    assert config.model.num_layers == 2
    assert config.model.rotary_pct == 0.25
    assert config.model.padded_vocab_size == 132
    assert config.model.seq_length == 16, "what is given stays"
    assert config.sources["num_layers"] == f"load {huggingface / 'config.json'}"
    config = resolve(RUN | {"load": str(slim)})
    assert (config.model.hidden_size, config.model.padded_vocab_size) == (32, 64)
    assert config.model.gpt_j_residual


@pytest.mark.parametrize("source", ["huggingface", "slim"])
def test_every_mismatch_is_named_with_both_values(source: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(source)
    wrong = {"num_layers": 3, "rotary_pct": 0.5, "gpt_j_residual": False, "activation": "relu", "hidden_size": 32}
    with pytest.raises(ConfigError) as caught:
        resolve(RUN | wrong | {"load": str(folder)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 4, lines
    for key, ours, theirs in (
        ("num_layers", "3", "2"),
        ("rotary_pct", "0.5", "0.25"),
        ("gpt_j_residual", "false", "true"),
        ("activation", "relu", "gelu"),
    ):
        line = next(line for line in lines if line.startswith(f"{key}: "))
        assert f"{key}: {ours} is not what {folder}" in line
        assert f"has, {theirs};" in line


def test_other_spellings_of_the_same_model_agree(huggingface: Path) -> None:
    same = {"expansion_factor": 4, "norm": "te_layernorm", "rms_norm_epsilon": 1e-5, "mlp_multiple_of": 64}
    assert resolve(RUN | same | {"load": str(huggingface)}).model.mlp_inner_width == 128


def test_longer_sequences_may_be_asked_for(huggingface: Path) -> None:
    longer = {"seq_length": 64, "max_position_embeddings": 64, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert resolve(RUN | longer | {"load": str(huggingface)}).model.seq_length == 64


def test_a_mistyped_folder_is_told_instead_of_missing_sizes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(RUN | {"load": str(tmp_path / "pythia")})
    # With the sizes given it is a run that has not begun yet.
    sized = MODEL | RUN | {"load": str(tmp_path / "pythia"), "seq_length": 16}
    assert resolve(sized).model.num_layers == 2
    (tmp_path / "pythia").write_text("weights")
    with pytest.raises(CheckpointError, match="pythia: a file; name the folder"):
        load_folder(resolve(sized))


def test_a_tokenizer_larger_than_the_rows_is_refused(tmp_path: Path, huggingface: Path, few_tokens: str) -> None:
    from neox.training.preflight import prepare

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(140)}, unk_token="w0"))
    backend.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    backend.save(str(tmp_path / "words.json"))
    names = {"tokenizer_type": "HFTokenizer", "vocab_file": str(tmp_path / "words.json")}
    config = resolve(RUN | names | {"data_path": few_tokens, "load": str(huggingface)})
    with pytest.raises(CheckpointError, match="132 rows of vocabulary and the tokenizer 142 tokens"):
        prepare(config)


def test_a_tokenizer_without_a_file_is_counted_too(slim: Path, few_tokens: str) -> None:
    from neox.training.preflight import prepare

    names = {"tokenizer_type": "CharLevelTokenizer"}
    config = resolve(RUN | names | {"data_path": few_tokens, "load": str(slim), "seq_length": 16})
    with pytest.raises(CheckpointError, match="rows of vocabulary and the tokenizer 512 tokens"):
        prepare(config)


def test_a_folder_of_other_things_is_no_place_to_start_from(tmp_path: Path, few_tokens: str) -> None:
    from neox.training.preflight import prepare

    (tmp_path / "readme.txt").write_text("notes")
    flat = MODEL | RUN | {"data_path": few_tokens, "load": str(tmp_path)}
    with pytest.raises(CheckpointError, match=r"no checkpoint; found readme\.txt, expected manifest\.json"):
        prepare(resolve(flat))
    # Its own folder may hold logs before the first checkpoint is in it.
    prepare(resolve(flat | {"save": str(tmp_path), "checkpoint_factor": 1}))


def test_a_native_checkpoint_describes_its_model_too(tmp_path: Path, few_tokens: str) -> None:
    flat = MODEL | RUN | {"data_path": few_tokens, "save": str(tmp_path), "checkpoint_factor": 2, "load": str(tmp_path)}
    run_ranks(train_loaded, 1, flat, 1)
    without = {key: value for key, value in flat.items() if key not in MODEL or key == "seq_length"}
    assert resolve(without).model == resolve(flat).model
    with pytest.raises(ConfigError, match=r"rotary_pct: 1\.0 is not what .*manifest\.json has, 0\.25"):
        resolve(flat | {"rotary_pct": 1.0})


def test_text_is_generated_from_the_folder_alone(tmp_path: Path, slim: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(62)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    backend.save(str(tmp_path / "words.json"))
    names = {"tokenizer_type": "HFTokenizer", "vocab_file": str(tmp_path / "words.json")}
    (tmp_path / "prompts.txt").write_text("w5 w6 w7\n")
    flat = names | {"load": str(slim), "temperature": 0.0, "maximum_tokens": 4, "train_micro_batch_size_per_gpu": 1}
    flat |= {"text_gen_type": "input-file", "sample_input_file": str(tmp_path / "prompts.txt")}
    (tmp_path / "run.yml").write_text(json.dumps(flat))
    texts = []
    for tensor in (1, 2):
        out = tmp_path / f"{tensor}.jsonl"
        words = [tmp_path / "run.yml", f"model_parallel_size={tensor}", f"sample_output_file={out}"]
        done = fork_script("generate.py", *words, ranks=tensor)
        assert done.returncode == 0, done.stderr
        texts.append(json.loads(out.read_text())["text"])
    assert texts[0]
    assert texts[0] == texts[1]


def test_the_tokenizer_beside_the_weights_is_used_where_none_is_named(tmp_path: Path, huggingface: Path) -> None:
    folder = shutil.copytree(huggingface, tmp_path / "model")
    words = {"<|endoftext|>": 0, "a": 1}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a")).save(str(folder / "tokenizer.json"))
    run = RUN | {"load": str(folder)}
    found = resolve(run).tokenizer
    assert (found.tokenizer_type, found.vocab_file) == ("HFTokenizer", str(folder / "tokenizer.json"))
    named = resolve(run | {"tokenizer_type": "CharLevelTokenizer"}).tokenizer
    assert (named.tokenizer_type, named.vocab_file) == ("CharLevelTokenizer", None)
