"""Folders that hold two of something: what is read is what transformers reads, or nothing."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint.exports import exported, same_weights
from model_families import GQA, KEYS, LLAMA
from safetensors.torch import load_file, save_file
from scripts_of import run_script
from weight_sources import RandomWeights

from neox.checkpoint.described import open_described
from neox.checkpoint.huggingface import HuggingFaceReader
from neox.checkpoint.huggingface.hub import check_folder
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.upstream.write import UpstreamLayout, UpstreamWriter
from neox.config import config_from_dict
from neox.errors import CheckpointError

EMBEDDING = "layers.0.word_embeddings.weight"
TIED = LLAMA | {"no_weight_tying": False}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Put tensors into the file of a model, `__` for a dot; None takes one out."""
    held = load_file(folder / SINGLE)
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor.contiguous()
    save_file(held, folder / SINGLE, metadata={"format": "pt"})


def save(folder: Path, storage: str, tensors: dict[str, torch.Tensor]) -> None:
    """Write the weights of a folder: `one file`, `parts`, `pickled`, or `pickled parts`."""
    is_pickled, placed = storage.startswith("pickled"), {}
    items, count = list(tensors.items()), 2 if storage.endswith("parts") else 1
    for number in range(count):
        part, file = dict(items[number::count]), f"part-{number}.{'bin' if is_pickled else 'safetensors'}"
        if count == 1:
            file = BIN if is_pickled else SINGLE
        if is_pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    if count > 1:
        (folder / (BIN_INDEX if is_pickled else INDEX)).write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize("storage", ["one file", "parts", "pickled", "pickled parts"])
@pytest.mark.parametrize(
    ("keys", "embedding", "head"),
    [
        (TIED, "model.embed_tokens", "lm_head"),
        (KEYS["opt"] | {"no_weight_tying": False}, "model.decoder.embed_tokens", "lm_head"),
        (KEYS["neox"] | {"no_weight_tying": False}, "gpt_neox.embed_in", "embed_out"),
    ],
    ids=["llama", "opt", "neox"],
)
def test_another_head_of_a_tied_model(tmp_path: Path, keys: dict, embedding: str, head: str, storage: str) -> None:
    folder = tmp_path / "out"
    _, weights = exported(folder, **keys)
    whole = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()

    def with_head(tensor: torch.Tensor) -> HuggingFaceReader:
        save(folder, storage, whole | {f"{head}.weight": tensor})
        reader = open_checkpoint(folder)
        reader.check_files()
        same_weights(reader, weights)
        return reader

    table = whole[f"{embedding}.weight"]
    with_head(table.clone())
    with_head(table.double())
    other = table.clone()
    other[3, 5] += 1e-3
    message = rf"config\.json: ties the head to the embedding \(tie_word_embeddings\), but {head}\.weight is not "
    for wrong in (other, table[:-1].clone()):
        with pytest.raises(CheckpointError, match=message + rf"{embedding}\.weight; set tie_word_embeddings to false"):
            with_head(wrong)


def test_a_head_of_its_own_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """As the message says: untied in config.json, the logits are those of transformers."""
    from neox.checkpoint.conversion.convert import largest_logit_difference

    exported(tmp_path / "out", **TIED)
    changed(tmp_path / "out", lm_head__weight=torch.randn(512, 32, generator=torch.Generator().manual_seed(1)))
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    weights, config = open_described(tmp_path / "out")
    assert largest_logit_difference(tmp_path / "out", weights, config.model, dtype=torch.float32) < 1e-4


def test_the_tools_and_the_first_tensor_refuse_another_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    exported(folder, **TIED)
    changed(folder, lm_head__weight=torch.ones(512, 32))
    with pytest.raises(CheckpointError, match="ties the head"):  # `load` of generate.py reads without check_files
        HuggingFaceReader(folder).tensor(EMBEDDING)
    words = ("--hf_dir", folder, "--output_dir", tmp_path / "native", "--config_file", tmp_path / "new.yml")
    assert run_script("tools/ckpts/convert_hf_to_neox.py", *words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "new.yml").exists()
    assert not (tmp_path / "native").exists()


def test_a_tied_model_that_kept_the_head_alone(tmp_path: Path) -> None:
    """transformers ties the embedding to the head then."""
    _, weights = exported(tmp_path / "out", **TIED)
    changed(tmp_path / "out", lm_head__weight=weights.tensor(EMBEDDING), model__embed_tokens__weight=None)
    same_weights(open_checkpoint(tmp_path / "out"), weights)


def test_an_untied_model_without_a_head(tmp_path: Path) -> None:
    exported(tmp_path / "out", **LLAMA | {"no_weight_tying": True})
    changed(tmp_path / "out", lm_head__weight=None)
    with pytest.raises(CheckpointError, match=r"has no tensor lm_head\.weight, .* does not tie the head"):
        open_checkpoint(tmp_path / "out").check_files()


def test_one_parameter_under_two_names(tmp_path: Path) -> None:
    _, weights = exported(tmp_path / "out", **KEYS["neox"])
    head = load_file(tmp_path / "out" / SINGLE)["embed_out.weight"]
    changed(tmp_path / "out", lm_head__weight=head.clone())
    same_weights(open_checkpoint(tmp_path / "out"), weights)
    changed(tmp_path / "out", lm_head__weight=head + 1)
    with pytest.raises(CheckpointError, match=r"embed_out\.weight and lm_head\.weight are one parameter and differ"):
        open_checkpoint(tmp_path / "out").check_files()


@pytest.mark.parametrize("older", [INDEX, BIN, BIN_INDEX])
def test_the_weights_that_transformers_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture, older: str) -> None:
    """Two sets of weights in a folder: of a sharded save and a newer whole one, say."""
    folder = tmp_path / "out"
    config, weights = exported(folder, **GQA)
    old = {name: tensor + 1 for name, tensor in load_file(folder / SINGLE).items()}
    save(folder, {INDEX: "parts", BIN: "pickled", BIN_INDEX: "pickled parts"}[older], old)
    same_weights(open_checkpoint(folder), weights)
    said = [record.getMessage() for record in caplog.records]
    assert said == ([f"{folder}: {SINGLE} is read, as transformers does, and {INDEX} is not"] * (older == INDEX))
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.norm.weight"]
    assert torch.equal(theirs.float(), weights.tensor(f"layers.{config.model.num_layers + 3}.norm.scale"))
    if older == INDEX:
        with pytest.raises(CheckpointError, match="two models; remove the one that is older"):
            check_folder(folder)


def test_pickled_weights_whole_before_parts(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    _, weights = exported(folder, **GQA)
    whole = load_file(folder / SINGLE)
    save(folder, "pickled parts", {name: tensor + 1 for name, tensor in whole.items()})
    save(folder, "pickled", whole)
    (folder / SINGLE).unlink()
    same_weights(open_checkpoint(folder), weights)


def test_parts_and_their_index(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    _, weights = exported(folder, **GQA)
    save(folder, "parts", load_file(folder / SINGLE))
    (folder / SINGLE).unlink()
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    first, second = load_file(folder / "part-0.safetensors"), load_file(folder / "part-1.safetensors")
    same_weights(open_checkpoint(folder), weights)

    name = next(iter(first))  # in the other part, whatever the index says: transformers reads both whole
    (folder / INDEX).write_text(json.dumps({"weight_map": index | {name: "part-1.safetensors"}}))
    same_weights(open_checkpoint(folder), weights)

    save_file(second | {name: first[name] + 1}, folder / "part-1.safetensors")
    with pytest.raises(CheckpointError, match=rf"part-1\.safetensors: holds {name}, and so does part-0\.safetensors"):
        open_checkpoint(folder).check_files()

    save_file(second | {"model.layers.9.mlp.up_proj.weight": torch.ones(2)}, folder / "part-1.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.9\.mlp\.up_proj\.weight, which a Llama"):
        open_checkpoint(folder).check_files()

    (folder / "part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"part-1\.safetensors: no such file"):
        open_checkpoint(folder).check_files()


def test_what_changes_the_tensors_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    exported(folder, **GQA)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: the folder also holds an adapter of PEFT"):
        open_checkpoint(folder)
    (folder / "adapter_config.json").unlink()
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match=r"config\.json: the model is quantised \(fp8\)"):
        open_checkpoint(folder)


def test_two_formats_in_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    exported(folder, **GQA)
    (folder / "consolidated.safetensors").write_text("Mistral's own, beside the same model for transformers")
    (folder / "params.json").write_text("{}")
    assert isinstance(open_checkpoint(folder), HuggingFaceReader)
    (folder / "consolidated.00.pth").touch()
    with pytest.raises(CheckpointError, match=r"holds weights in Meta's and Hugging Face's format"):
        open_checkpoint(folder)


KEYS_OF_RUN = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "padded_vocab_size": 512,
    "train_micro_batch_size_per_gpu": 1,
    "tokenizer_type": "CharLevelTokenizer",
    "no_weight_tying": True,
}


def test_a_head_that_the_configuration_of_a_run_ties(tmp_path: Path) -> None:
    config = config_from_dict(KEYS_OF_RUN)
    layout = UpstreamLayout(pipe=1, tensor=1, legacy=True)
    folder = UpstreamWriter(RandomWeights(config.model), config, layout=layout, iteration=0).write(tmp_path)
    open_described(folder)
    saved = folder / "configs" / "model.yml"
    text = saved.read_text()
    assert "no_weight_tying: true" in text
    saved.write_text(text.replace("no_weight_tying: true", "no_weight_tying: false"))
    with pytest.raises(CheckpointError, match=r"holds layers\.6\.final_linear\.weight, .* ties the head"):
        open_described(folder)


def test_a_matrix_of_a_run_under_an_old_name_and_a_new_one(tmp_path: Path) -> None:
    config = config_from_dict(KEYS_OF_RUN)
    layout = UpstreamLayout(pipe=1, tensor=1, legacy=True)
    folder = UpstreamWriter(RandomWeights(config.model), config, layout=layout, iteration=0).write(tmp_path)
    path = folder / "layer_02-model_00-model_states.pt"
    held = torch.load(path)
    held["mlp.linear1.weight"] = held["mlp.dense_h_to_4h.weight"] + 1
    torch.save(held, path)
    with pytest.raises(CheckpointError, match=r"layer 2 holds mlp\.linear1\.weight twice"):
        open_checkpoint(folder)
