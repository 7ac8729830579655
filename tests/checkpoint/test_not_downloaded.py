"""What a clone without Git LFS, or a download without a login, leaves in the place of files: every reader says so."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint.exports import exported, llama_tokenizer
from golden_models import GOLDENS
from model_families import GQA
from safetensors.torch import load_file
from scripts_of import run_script

from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.storage.tensor_file import TensorFile
from neox.checkpoint.storage.torch_file import TorchFile
from neox.config import TokenizerConfig
from neox.data.documents import read_documents
from neox.data.indexed import IndexedDataset
from neox.data.indexed_writer import IndexedDatasetWriter
from neox.data.tokenizers import build_tokenizer
from neox.data.tokenizers.special_tokens import tokens_in
from neox.errors import CheckpointError, DataError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d7a2146" * 8 + "\nsize 4999819336\n"
PAGES = {
    "pointer": (POINTER, r"a Git LFS pointer and not the file itself; run `git lfs pull`"),
    "page": (
        "\n<!DOCTYPE html>\n<html><body>Sign in</body></html>" + "." * 99,
        r"a web page and not the file itself; ",
    ),
    "answer": ('<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', r"a server's answer in XML and not"),
}


@pytest.mark.parametrize("kind", PAGES)
def test_in_the_place_of_weights(tmp_path: Path, kind: str) -> None:
    text, message = PAGES[kind]
    for name, read in (("a.safetensors", TensorFile), ("a.bin", TorchFile), ("a.pth", TorchFile)):
        (tmp_path / name).write_text(text)
        with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
            read(tmp_path / name)


@pytest.mark.parametrize("kind", PAGES)
def test_in_the_place_of_the_files_of_a_model(tmp_path: Path, kind: str) -> None:
    text, message = PAGES[kind]
    folder = tmp_path / "out"
    exported(folder, **GQA)
    names = ("config.json", "model.safetensors", "model.safetensors.index.json")
    for name in names:
        kept = (folder / name).read_bytes() if (folder / name).is_file() else None
        (folder / name).write_text(text)
        if name == names[2]:
            (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=rf"{name}: {message}".replace(".", r"\.")):
            open_checkpoint(folder).tensor("layers.0.word_embeddings.weight")
        (folder / name).unlink() if kept is None else (folder / name).write_bytes(kept)


def test_in_the_place_of_metas_and_gpt_neoxs(tmp_path: Path) -> None:
    meta = tmp_path / "meta"
    meta.mkdir()
    (meta / "consolidated.00.pth").write_text(POINTER)
    (meta / "params.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"params\.json: a Git LFS pointer"):
        open_checkpoint(meta)
    (meta / "params.json").write_text(json.dumps({"dim": 32, "n_layers": 2, "n_heads": 4}))
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth: a Git LFS pointer"):
        open_checkpoint(meta)
    run = shutil.copytree(GOLDENS / "pipe" / "global_step4", tmp_path / "run")
    (run / "layer_03-model_00-model_states.pt").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"layer_03-model_00-model_states\.pt: a Git LFS pointer"):
        open_checkpoint(run)


def test_in_the_place_of_a_tokenizer(tmp_path: Path) -> None:
    for name, options in (
        ("tokenizer.json", {"tokenizer_type": "HFTokenizer"}),
        ("vocab.json", {"tokenizer_type": "GPT2BPETokenizer", "merge_file": str(tmp_path / "merges.txt")}),
        ("merges.txt", {"tokenizer_type": "GPT2BPETokenizer", "merge_file": str(tmp_path / "merges.txt")}),
        ("tokenizer.model", {"tokenizer_type": "SPMTokenizer"}),
    ):
        for other in ("vocab.json", "merges.txt"):
            (tmp_path / other).write_text("{}")
        (tmp_path / name).write_text(POINTER)
        vocabulary = tmp_path / ("vocab.json" if name == "merges.txt" else name)
        with pytest.raises(DataError, match=rf"{name}: a Git LFS pointer".replace(".", r"\.")):
            build_tokenizer(TokenizerConfig(vocab_file=str(vocabulary), **options))
    llama_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(POINTER)
    with pytest.raises(DataError, match=r"tokenizer_config\.json: a Git LFS pointer"):
        tokens_in(tmp_path, {}.get)


def test_in_the_place_of_data(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "text", np.dtype(np.uint16)) as writer:
        writer.add_document(np.arange(9, dtype=np.uint16))
    for suffix in (".bin", ".idx"):
        path = tmp_path / f"text{suffix}"
        path.write_text(POINTER)
        with pytest.raises(DataError, match=rf"text\{suffix}: a Git LFS pointer"):
            IndexedDataset(tmp_path / "text")


def test_in_the_place_of_documents(tmp_path: Path) -> None:
    """As plain text the pointer would be a document; a web page may be one."""
    for name in ("book.txt", "rows.jsonl", "book.txt.gz"):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(DataError, match=rf"{name}: a Git LFS pointer".replace(".", r"\.")):
            list(read_documents([tmp_path / name]))
    (tmp_path / "book.txt").write_text("<!doctype html><p>A text.")
    assert [document.raw for document in read_documents([tmp_path / "book.txt"])] == ["<!doctype html><p>A text."]


def test_the_tools_say_it_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(tmp_path / "out", **GQA)
    (tmp_path / "out" / "model.safetensors").write_text(POINTER)
    capsys.readouterr()
    assert run_script("tools/ckpts/convert_hf_to_neox.py", "--hf_dir", tmp_path / "out", "--output_dir", tmp_path) == 2
    said = capsys.readouterr().err
    assert "model.safetensors: a Git LFS pointer and not the file itself; run `git lfs pull`" in said
    assert said.count("\n") == 1
    assert run_script("tools/ckpts/verify_checkpoint.py", tmp_path / "out") == 1
    assert "a Git LFS pointer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("F8_E4M3", "w is of type F8_E4M3; the model is quantised; use its release in bf16, fp16 or fp32"),
        ("F8_E5M2", "w is of type F8_E5M2; the model is quantised"),
        ("F4", "w is of type F4; the model is quantised"),
        ("C64", "w is of type C64; only F64, F32, F16, BF16, .* can be read"),
        ("NEW", "w is of type NEW; only F64"),
    ],
)
def test_types_that_cannot_be_read_are_named(tmp_path: Path, kind: str, message: str) -> None:
    header = json.dumps({"w": {"dtype": kind, "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"ab")
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: {message}"):
        TensorFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_in_a_pickle(tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """Without their scales they would be another model."""
    folder = tmp_path / "out"
    exported(folder, **GQA)
    held = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    torch.save(held | {name: held[name].to(dtype)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    words = ("--hf_dir", folder, "--output_dir", tmp_path / "native", "--config_file", tmp_path / "m.yml")
    assert run_script("tools/ckpts/convert_hf_to_neox.py", *words) == 2
    assert f"is of type {str(dtype).removeprefix('torch.')}, as in quantised models" in capsys.readouterr().err
