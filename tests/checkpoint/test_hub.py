"""Uploads to the Hugging Face Hub, which is not asked."""

import json

import pytest
import torch
from checkpoint.exports import exported, random_run
from model_families import GQA
from scripts_of import run_script

from neox.checkpoint.huggingface import HuggingFaceWriter
from neox.checkpoint.huggingface.files import INDEX


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
    flags = [tmp_path / "out", "lab/model-1.4b"]
    assert run_script("tools/ckpts/upload_to_hub.py", *flags, "--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    files = {"config.json", "generation_config.json", "model.safetensors"}
    assert {line.split()[-1] for line in said[:-1]} == files
    total = sum((tmp_path / "out" / name).stat().st_size for name in files)
    assert said[-1] == f"would upload 3 files, {total:,} bytes, to lab/model-1.4b (private) at main"
    assert hub.calls == []
    assert run_script("tools/ckpts/upload_to_hub.py", *flags, "step2", "--public", "--message", "Two") == 0
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
        ((folder / "weights.tmp").touch, "left over from a copy"),
        ((folder / "config.json").unlink, "config.json: no such file"),
    ]
    for damage, message in cases:
        damage()
        assert run_script("tools/ckpts/upload_to_hub.py", folder, "lab/model") == 2, message
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        file.write_bytes(whole)
        (folder / INDEX).write_text(json.dumps(index))
        (folder / "generation_config.json").write_text("{}")
        (folder / "weights.tmp").unlink(missing_ok=True)
    for repo in ("model", "lab/", "lab/a b", "lab/model/extra"):
        assert run_script("tools/ckpts/upload_to_hub.py", folder, repo) == 2
        assert "give ORGANISATION/NAME" in capsys.readouterr().err
    assert hub.calls == []


def test_what_the_hub_refuses_is_one_line(tmp_path, capsys, hub, monkeypatch):
    from huggingface_hub.errors import HFValidationError

    exported(tmp_path / "out", **GQA)

    def refuse(self, **options):
        raise HFValidationError("Repo id must be\nsomething else")

    monkeypatch.setattr(FakeApi, "upload_folder", refuse)
    assert run_script("tools/ckpts/upload_to_hub.py", tmp_path / "out", "lab/model") == 2
    assert "lab/model: the Hub did not take it (Repo id must be something else)\n" in capsys.readouterr().err
