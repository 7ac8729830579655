import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from neox.checkpoint.meta_llama import MetaLlamaReader, by_halves
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.weights import weight_source
from neox.config import load_config
from neox.errors import CheckpointError
from neox.model.build import build_decoder

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "ckpts"))

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
RELEASES = {
    "1": ({"num_key_value_heads": 4, "rms_norm_eps": 1e-6}, {}),
    "2": ({"num_key_value_heads": 2, "rms_norm_eps": 1e-5}, {"n_kv_heads": 2}),
    "3.1": (
        {
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {"n_kv_heads": 2, "rope_theta": 500000.0, "use_scaled_rope": True},
    ),
}
MODULES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def llama(release):
    import transformers

    torch.manual_seed(3)
    changes, _ = RELEASES[release]
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, **changes)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) if "norm" in name else 0.1 * torch.randn_like(parameter))
    return model


def neighbours(rows):
    """Rows of rotated halves as Meta has them: dimension i of a head beside dimension i + H/2."""
    heads = rows.view(-1, 2, 4, rows.shape[1])
    return torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(rows.shape)


def write_meta(folder, model, release, *, shards=1, wide=True):
    """Write a model as Meta would; `wide` divides the embedding by its width, as up to Llama 2."""
    folder.mkdir()
    whole = {"rope.freqs": (torch.ones(4), None)}
    for name, tensor in model.state_dict().items():
        if name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            theirs = {"model.e": "tok_embeddings", "model.n": "norm", "lm_head": "output"}[name[:7]]
            dimension = {"tok_embeddings": int(wide), "norm": None, "output": 0}[theirs]
            whole[f"{theirs}.weight"] = (tensor, dimension)
        else:
            _, _, layer, module = name.removesuffix(".weight").split(".", 3)
            theirs, dimension = MODULES[module]
            rows = neighbours(tensor) if theirs.endswith(("wq", "wk")) else tensor
            whole[f"layers.{layer}.{theirs}.weight"] = (rows, dimension)
    for rank in range(shards):
        part = {n: t if d is None else t.chunk(shards, d)[rank].clone() for n, (t, d) in whole.items()}
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    changes, extra = RELEASES[release]
    params = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": -1, "multiple_of": 16}
    (folder / "params.json").write_text(json.dumps(params | {"norm_eps": changes["rms_norm_eps"]} | extra))


@pytest.mark.parametrize(("release", "shards", "wide"), [("1", 1, True), ("2", 2, True), ("3.1", 2, False)])
def test_the_script_imports_what_computes_the_same(tmp_path, capsys, release, shards, wide):
    import convert_raw_llama_to_neox

    model = llama(release)
    (tmp_path / "llama").mkdir()
    write_meta(tmp_path / "llama" / "7B", model, release, shards=shards, wide=wide)
    flags = ["--input_dir", str(tmp_path / "llama"), "--model_size", "7B", "--output_dir", str(tmp_path / "out")]
    convert_raw_llama_to_neox.main([*flags, "--num_output_shards", "2", "--pipeline_parallel"])
    assert "global_step0" in capsys.readouterr().out
    path = tmp_path / "out" / "model.yml"
    keys = yaml.safe_load(path.read_text())
    assert keys["max_position_embeddings"] == {"1": 2048, "2": 4096, "3.1": 131072}[release]
    keys |= {"seq_length": 64, "max_position_embeddings": 64, "train_micro_batch_size_per_gpu": 1}
    path.write_text(yaml.safe_dump(keys))
    reader = open_checkpoint(tmp_path / "out")
    tokens = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = build_decoder(load_config([path]).model, source=weight_source(reader))(tokens)
        theirs = model(tokens).logits
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5


def test_rotated_neighbours_become_halves():
    rows = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7, 10, 14, 11, 15, 12, 16, 13, 17.0])[:, None]
    assert by_halves(rows, 8).flatten().tolist() == [*range(8), *range(10, 18)]


def test_a_folder_of_metas_is_opened_and_checked(tmp_path):
    write_meta(tmp_path / "7B", llama("2"), "2", shards=2)
    reader = open_checkpoint(tmp_path / "7B")
    assert isinstance(reader, MetaLlamaReader)
    reader.check_files()
    assert reader.padded_vocab_size == 64
    assert {name: tuple(reader.tensor(name).shape) for name in reader.names()} == reader.shapes()

    shutil.copytree(tmp_path / "7B", tmp_path / "cut")
    (tmp_path / "cut" / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"its 1 files have 16 rows of queries, params\.json says 32"):
        open_checkpoint(tmp_path / "cut")
    (tmp_path / "7B" / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: no such file"):
        open_checkpoint(tmp_path / "7B")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("{", "not valid JSON"),
        ('{"dim": 32}', "has no n_layers"),
        ('{"dim": 32, "n_layers": 2, "n_heads": 4, "vision_chunk_size": 1}', "only dense text models"),
    ],
)
def test_other_params_are_refused_in_one_line(tmp_path, params, message):
    write_meta(tmp_path / "7B", llama("1"), "1")
    (tmp_path / "7B" / "params.json").write_text(params)
    with pytest.raises(CheckpointError, match=message) as raised:
        open_checkpoint(tmp_path / "7B")
    assert "\n" not in str(raised.value)


def test_files_that_are_no_llama_are_refused(tmp_path):
    write_meta(tmp_path / "7B", llama("1"), "1")
    torch.save({"weight": torch.ones(2)}, tmp_path / "7B" / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: has no tok_embeddings"):
        open_checkpoint(tmp_path / "7B")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files[0].update({"layers.0.attention.wq.bias": torch.ones(32)}), "holds layers.0.attention.wq"),
        (lambda files: files[1]["norm.weight"].add_(1), "its files differ in norm.weight"),
    ],
)
def test_what_params_do_not_describe_is_refused(tmp_path, change, message):
    write_meta(tmp_path / "7B", llama("2"), "2", shards=2)
    paths = sorted((tmp_path / "7B").glob("*.pth"))
    files = [torch.load(path) for path in paths]
    change(files)
    for path, file in zip(paths, files, strict=True):
        torch.save(file, path)
    with pytest.raises(CheckpointError, match=message):
        MetaLlamaReader(tmp_path / "7B")
