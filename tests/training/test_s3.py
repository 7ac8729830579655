"""`s3_path`: every host uploads its part, and what is downloaded again is whole. Against a store on this machine."""

import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from checkpoint.small_checkpoints import RUN, save
from moto.server import ThreadedMotoServer
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING

from neox.checkpoint.native.integrity import damages
from neox.checkpoint.native.lineage import Lineage
from neox.checkpoint.native.s3 import S3Folder, upload_checkpoint
from neox.checkpoint.native.store import NativeReader, Team
from neox.config import config_from_dict
from neox.errors import CheckpointError, ConfigError
from neox.pulse import pulses
from neox.training.uploads import Uploads, check_copies, check_store

PART = 5 * 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a store."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def variables(server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What boto3 reads, in this process too."""
    variables = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.fixture
def bucket(variables: dict[str, str], request: pytest.FixtureRequest) -> str:
    """A new bucket."""
    name = re.sub("[^a-z]+", "-", request.node.name)[:60].strip("-")
    boto3.client("s3").create_bucket(Bucket=name)
    return name


def objects(bucket: str) -> list[str]:
    return [entry["Key"] for entry in boto3.client("s3").list_objects_v2(Bucket=bucket).get("Contents", [])]


def download(bucket: str, prefix: str, folder: Path) -> Path:
    client = boto3.client("s3")
    for key in objects(bucket):
        path = folder / key.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, key, str(path))
    return folder


def train_as_a_host(flat: dict[str, Any], variables: dict[str, str]) -> list[str]:
    """Train as one of two hosts of one process each; return the files that this host uploaded."""
    from neox.checkpoint.native.s3 import S3Folder
    from neox.training.run import train

    torch.set_num_threads(1)
    os.environ.update(variables)
    rank = os.environ["RANK"]
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = "0", "1"
    socket.gethostname = lambda: f"host{rank}"  # type: ignore[assignment]
    uploaded: list[str] = []
    put_file = S3Folder.put_file

    def noted(target: S3Folder, path: Path, key: str) -> None:
        uploaded.append(key)
        put_file(target, path, key)

    S3Folder.put_file = noted  # type: ignore[method-assign]
    train(config_from_dict(flat, world_size=2))
    return uploaded


def test_two_hosts_upload_what_they_wrote(tmp_path: Path, corpus: str, bucket: str, variables: dict[str, str]) -> None:
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "train_iters": 3, "extra_save_iters": [2]}
    flat |= {"save": str(tmp_path / "run"), "async_save": True, "s3_path": f"s3://{bucket}/a/b/"}
    first, second = run_ranks(train_as_a_host, 2, flat, variables)
    assert first
    assert second
    for key in first + second:
        name = key.rpartition("/")[2]
        if name.endswith(".safetensors"):
            assert (key in second) == (name.split("-")[1] == "00001")
        else:
            assert key in first
    assert not set(first) & set(second)
    root = download(bucket, "a/b/run/", tmp_path / "again")
    assert (root / "latest").read_text() == "global_step3"
    for step in (2, 3):
        assert damages(root / f"global_step{step}") == []
        mine, theirs = (
            sorted(p.relative_to(top).as_posix() for p in (top / f"global_step{step}").rglob("*") if p.is_file())
            for top in (root, tmp_path / "run")
        )
        assert mine == theirs


def test_large_files_go_in_parts_and_the_manifest_and_latest_come_last(tmp_path: Path, bucket: str) -> None:
    folder = save(tmp_path / "run", 3, numbers=500_000)  # optimizer: 12 MB
    target = S3Folder(f"s3://{bucket}", part_bytes=PART)
    asked: list[tuple[str, str]] = []

    def note(params: dict[str, Any], model: Any, **others: Any) -> None:
        if "Key" in params:  # not a look at what is there
            asked.append((model.name, params["Key"].removeprefix("run/")))

    target._client.meta.events.register("provide-client-params.s3", note)
    assert upload_checkpoint(folder, target, Team()) is None
    assert [name for name, key in asked if "optimizer" in key].count("UploadPart") == 3
    assert asked[-2:] == [("PutObject", "global_step3/manifest.json"), ("PutObject", "latest")]
    root = download(bucket, "run/", tmp_path / "again")
    assert damages(root / "global_step3") == []
    assert NativeReader(root / "global_step3").names() == NativeReader(folder).names()


def test_what_failed_is_tried_again_with_the_next(tmp_path: Path, variables: dict[str, str]) -> None:
    settings = checkpoint_settings("s3://comes-later/run-7")
    uploads = Uploads(settings)
    folder, before = save(tmp_path / "run", 1), pulses()
    warning = uploads.upload(folder, Team())
    assert pulses() > before, "an attempt is no stall"
    assert warning is not None
    assert "s3_path s3://comes-later/run-7: global_step1 not uploaded" in warning
    assert "tried again at the next save" in warning
    assert "\n" not in warning
    warning = uploads.upload(save(tmp_path / "run", 2), Team())
    assert warning is not None
    assert "global_step1, global_step2 not uploaded" in warning
    boto3.client("s3").create_bucket(Bucket="comes-later")
    assert uploads.upload(save(tmp_path / "run", 3), Team()) is None
    assert uploads.waiting == []
    root = download("comes-later", "run-7/run/", tmp_path / "again")
    assert [damages(root / f"global_step{step}") for step in (1, 2, 3)] == [[], [], []]
    assert (root / "latest").read_text() == "global_step3"


def test_what_is_deleted_before_it_is_uploaded_is_named(
    tmp_path: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: list[str | None] = ["out of reach", None]
    monkeypatch.setattr("neox.training.uploads.upload_checkpoint", lambda *_: problems.pop(0))
    uploads = Uploads(checkpoint_settings("s3://somewhere"))
    first, second = save(tmp_path / "run", 1), save(tmp_path / "run", 2)
    assert "global_step1 not uploaded (out of reach)" in str(uploads.upload(first, Team()))
    shutil.rmtree(first)  # `keep_last_n_checkpoints`
    warning = uploads.upload(second, Team())
    assert warning == "s3_path s3://somewhere: global_step1 deleted before the store had it, and never uploaded"
    assert uploads.waiting == []


def test_the_copies_of_another_run_stay(tmp_path: Path, bucket: str) -> None:
    """Two folders of one name, and one address."""
    settings = checkpoint_settings(f"s3://{bucket}/copies")
    theirs, ours = Lineage("theirs"), Lineage("ours", ("theirs",))
    uploads = Uploads(settings)
    for iteration in (1, 2):
        assert uploads.upload(save(tmp_path / "a" / "run", iteration, lineage=theirs), Team()) is None
    check_copies(settings, theirs, start=2)
    check_copies(settings, theirs, start=1)  # its own, further on
    check_copies(settings, ours, start=1)
    for lineage, start, held in ((ours, None, "run/global_step1, run/global_step2"), (RUN, 1, "run/global_step2")):
        with pytest.raises(CheckpointError) as raised:
            check_copies(settings, lineage, start=start)
        assert str(raised.value) == (
            f"s3_path s3://{bucket}/copies: holds {held} of another run; name another s3_path or save"
        )
    before = download(bucket, "copies/run/", tmp_path / "before")
    warning = Uploads(settings).upload(save(tmp_path / "b" / "run", 2), Team())
    assert warning is not None
    assert "global_step2 not uploaded (run/global_step2 there was written by another run and is " in warning
    after = download(bucket, "copies/run/", tmp_path / "after")
    for path in (path for path in before.rglob("*") if path.is_file()):
        assert path.read_bytes() == (after / path.relative_to(before)).read_bytes()
    assert Uploads(settings).upload(save(tmp_path / "c" / "run", 2, lineage=ours), Team()) is None


def checkpoint_settings(address: str) -> Any:
    flat = MODEL | TRAINING | ADAMW | {"data_path": "x", "save": "run", "checkpoint_factor": 1, "s3_path": address}
    return config_from_dict(flat, world_size=1).checkpoint


def test_a_store_that_cannot_be_used_is_one_line_before_training(
    bucket: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_store(checkpoint_settings(f"s3://{bucket}/x"))
    with pytest.raises(ConfigError, match=r"^s3_path s3://nowhere: bucket nowhere cannot be used \(.*404.*\); [^\n]*$"):
        check_store(checkpoint_settings("s3://nowhere"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"cannot be used \(Could not connect to the endpoint"):
        check_store(checkpoint_settings(f"s3://{bucket}"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no address")
    with pytest.raises(ConfigError, match=r"s3_path .*no address.*AWS_ENDPOINT_URL"):
        check_store(checkpoint_settings(f"s3://{bucket}"))
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r's3_path: needs boto3; pip install "neox\[s3\]"'):
        check_store(checkpoint_settings(f"s3://{bucket}"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"s3_path": "bucket/x"}, "s3_path: expected s3://bucket/prefix, got 'bucket/x'"),
        ({"s3_path": "s3:///x"}, "s3_path: expected s3://bucket/prefix, got 's3:///x'"),
        ({"s3_path": "s3://b", "save": None}, "s3_path: set without save"),
        ({"save": "s3://b/x"}, "save: a folder is needed, got s3://b/x; set s3_path"),
        ({"load": "s3://b/x"}, "load: a folder is needed, got s3://b/x; copy it here first"),
    ],
)
def test_addresses_in_the_wrong_place(changes: dict[str, Any], line: str) -> None:
    flat = MODEL | TRAINING | ADAMW | {"data_path": "x", "save": "run", "checkpoint_factor": 1}
    with pytest.raises(ConfigError) as raised:
        config_from_dict(flat | changes, world_size=1)
    assert line in str(raised.value)
