"""Files of a stranger, or of a disk that mangled them: one line, and nothing outside of the folder is read."""

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.exports import exported
from checkpoint.small_checkpoints import save
from model_families import GQA
from scripts_of import run_script

from neox.checkpoint.huggingface import HuggingFaceReader
from neox.checkpoint.native.fallback import checkpoint_to_load
from neox.checkpoint.native.manifest import Manifest, _checksum
from neox.checkpoint.storage.tensor_file import TensorFile
from neox.checkpoint.upstream.files import UpstreamFiles
from neox.errors import CheckpointError, UserError
from neox.files import write_whole

INDEX = "model.safetensors.index.json"


def forged(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change a manifest, and give it the checksum of what it says now."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    path.write_text(json.dumps({"checksum": _checksum(content)} | content))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["files"].update({"../../secret": 5}), r"names \.\./\.\./secret, which is no file"),
        (lambda c: c["files"].update({"/etc/passwd": 5}), "names /etc/passwd, which is no file"),
        (lambda c: [t.update(file="../x.safetensors") for t in c["tensors"].values()], r"names \.\./x\.safetensors"),
        (lambda c: [t.pop("file") for t in c["tensors"].values()], "not as this release writes it"),
        (lambda c: c.update(later=1), "not as this release writes it .*later.*use the release that did"),
        (lambda c: c["progress"].update(later=1), "not as this release writes it"),
        (lambda c: c.pop("schedule"), "not as this release writes it .*schedule"),
        (lambda c: c.update(files=[1]), "not as this release writes it"),
        (lambda c: c.update(config=[1]), r"not as this release writes it \(config is no dict\)"),
        (lambda c: c.update(environment=[1]), r"not as this release writes it \(environment is no dict\)"),
        (lambda c: c["progress"].update(iteration="x"), r"not as this release writes it \(a count is no whole number"),
        (lambda c: c["progress"].update(left_out=[["a"]]), "not as this release writes it"),
        (lambda c: c["layout"].update(zero_stage=None), r"not as this release writes it \(a count is no whole number"),
        (lambda c: c["files"].update(dict.fromkeys(c["files"], "x")), "not as this release writes it"),
        (lambda c: [t.pop("checksum") for t in c["tensors"].values()], "not as this release writes it"),
        (lambda c: c.update(checksums={}), "has no checksum of configs/"),
    ],
)
def test_a_forged_manifest(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"manifest\.json: {message}"):
        Manifest.read(forged(save(tmp_path, 1), change))


DEEP = "[" * 200_000


def test_nesting_without_end(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "manifest.json").write_text(DEEP)
    with pytest.raises(CheckpointError, match=r"manifest\.json: not valid JSON"):
        Manifest.read(folder)


@pytest.mark.parametrize("header", [DEEP, '{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'])
def test_a_header_that_no_tensor_has(tmp_path: Path, header: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(CheckpointError, match="its header is no list of tensors"):
        TensorFile(path)


def test_latest_of_zeros(tmp_path: Path) -> None:
    """As some file systems leave it after a power cut."""
    folder = save(tmp_path, 1)
    (tmp_path / "latest").write_bytes(bytes(12))
    with pytest.raises(CheckpointError, match="latest: damaged, it names no folder"):
        checkpoint_to_load(tmp_path, None, fallback=False)
    assert checkpoint_to_load(tmp_path, None, fallback=True) == folder


def test_a_folder_of_hugging_face(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is wrong with it, each tool that reads one says so in a line."""
    folder = tmp_path / "out"
    exported(folder, **GQA)
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    config = (folder / "config.json").read_text()

    def listed(value: Any) -> None:
        (folder / INDEX).write_text(json.dumps({"weight_map": value}))

    def no_file() -> None:
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()

    cases = (
        (lambda: listed({"lm_head.weight": "../secret.safetensors"}), "'../secret.safetensors', which is no file of"),
        (lambda: listed({"lm_head.weight": str(tmp_path / "secret.safetensors")}), "which is no file of the folder"),
        (lambda: listed({"lm_head.weight": 5}), "lm_head.weight is in 5, which is no file"),
        (lambda: listed(["lm_head.weight"]), "has no weight_map"),
        (lambda: (folder / "config.json").write_text(DEEP), "config.json: not valid JSON"),
        (no_file, f"config.json: cannot be read ({os.strerror(errno.EISDIR)})"),
    )
    capsys.readouterr()
    for damage, message in cases:
        (folder / "config.json").write_text(config)
        (folder / INDEX).unlink(missing_ok=True)
        damage()
        for words in (
            ("convert_hf_to_neox.py", "--hf_dir", folder, "--output_dir", tmp_path / "native"),
            ("upload_to_hub.py", folder, "lab/model", "--dry-run"),
        ):
            assert run_script(f"tools/ckpts/{words[0]}", *words[1:]) == 2
            said = capsys.readouterr().err
            assert message in said
            assert said.count("\n") == 1
        if (folder / "config.json").is_file():
            assert run_script("tools/ckpts/verify_checkpoint.py", folder) == 1
            assert message in capsys.readouterr().out
    assert not (tmp_path / "native").exists()


def test_a_link_in_a_circle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    name = "layer_00-model_00-model_states.pt"
    (folder / name).symlink_to(name)
    assert run_script("tools/ckpts/verify_checkpoint.py", folder) == 1
    assert f"{name}: no such file" in capsys.readouterr().out


def test_a_device_is_not_replaced(tmp_path: Path) -> None:
    """`--config_file /dev/null` in the hands of root would be the end of /dev/null."""
    pipe, link, text = tmp_path / "pipe", tmp_path / "link", tmp_path / "text"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe: cannot be written \\(it is no file\\)"):
        write_whole(pipe, "a")
    assert pipe.is_fifo()
    text.write_text("before")
    link.symlink_to(text)
    write_whole(link, "after")
    assert link.is_symlink()
    assert text.read_text() == "after"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "text"]


@pytest.mark.parametrize(
    "state",
    [{"module": ["x"]}, {"module": {3: torch.zeros(1)}}, {"args": {"model_parallel_size": "x"}}],
    ids=["list", "name", "text"],
)
def test_a_field_of_another_kind_in_a_file_of_gpt_neox(tmp_path: Path, state: dict[str, Any]) -> None:
    whole = {"module": {"sequential.0.word_embeddings.weight": torch.zeros(8, 4)}}
    torch.save(whole | state, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: not as GPT-NeoX writes it") as error:
        UpstreamFiles(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "message"),
    [({"model_type": ["llama"]}, "model_type is"), ({"intermediate_size": "x"}, "not as its release writes it")],
    ids=["type", "width"],
)
def test_a_field_of_another_kind_in_a_config_json(tmp_path: Path, field: dict[str, Any], message: str) -> None:
    content = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_attention_heads": 2} | field))
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceReader(tmp_path)
