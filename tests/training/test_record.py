"""What a run writes down of itself when it begins, and what it keeps to itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING

from neox import versions
from neox.checkpoint.native.manifest import Progress
from neox.config import config_from_dict, load_config
from neox.parallel.mesh import Mesh
from neox.secrets import masked_text, masked_values, masked_variables
from neox.training import record


def train_a_step(file: str) -> None:
    """Train, or go on."""
    from neox.training.run import train

    torch.set_num_threads(1)
    os.environ["MY_API_TOKEN"] = "0123456789"
    sys.argv = ["train.py", "small.yml", "online_url=http://me:concealed@host/x"]
    train(load_config([file], world_size=2))


def test_every_start_leaves_a_record(tmp_path: Path, corpus: str) -> None:
    save = {
        "save": str(tmp_path),
        "load": str(tmp_path),
        "data_path": corpus,
        "train_iters": 2,
        "exit_interval": 1,
        "checkpoint_factor": 1,
    }
    flat = MODEL | TRAINING | ADAMW | save | {"model_parallel_size": 2}
    flat |= {"wandb_host": "https://me:concealed@host", "comet_others": {"api_token": "concealed"}}
    given = tmp_path / "given" / "small.yml"
    given.parent.mkdir()
    given.write_text(yaml.safe_dump(flat) + "# password: concealed\n")
    run_ranks(train_a_step, 2, str(given))
    run_ranks(train_a_step, 2, str(given))
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "changes.patch"]
    written.remove(given)
    assert [path for path in written if b"concealed" in path.read_bytes()] == []
    assert yaml.safe_load((tmp_path / "global_step2" / "configs" / "small.yml").read_text())["train_iters"] == 2
    first, second = sorted((tmp_path / "record").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    found = json.loads((first / "run.json").read_text())
    assert (found["goes_on_from"], found["iteration"]) == (None, 0)
    assert found["layout"]["world_size"] == found["layout"]["tensor"] == 2
    ((_host, placed),) = found["hosts"].items()
    assert placed == {"ranks": [0, 1], "devices": ["cpu", "cpu"]}
    assert found["torch"]["version"] == torch.__version__
    assert {"neox", "deepspeed", "numpy", "PyYAML"} <= found["packages"].keys()
    assert found["environment"]["MY_API_TOKEN"] == "***"
    assert found["environment"]["WORLD_SIZE"] == "2"
    assert found["command"].endswith("train.py small.yml online_url=http://***@host/x")
    assert "0123456789" not in (first / "run.json").read_text()
    assert yaml.safe_load((first / "config.yml").read_text())["train_iters"] == 2
    resolved = yaml.safe_load((first / "resolved.yml").read_text())
    assert resolved["train_batch_size"] == 16
    assert resolved["io_retry_time"] == 120.0  # which nothing set
    logs = [(tmp_path / "logs" / "ranks" / f"rank-{rank:05d}.log").read_text() for rank in (0, 1)]
    assert re.search(r" rank 0 step 1 \|  samples/sec.*\n(.*\n)*.* rank 0 step 2 \|  samples/sec", logs[0])
    assert len(re.findall(r" rank 1 step \S+ \| started: rank 1 of 2 on ", logs[1])) == 2
    again = json.loads((second / "run.json").read_text())
    assert (again["goes_on_from"], again["iteration"]) == (str(tmp_path / "global_step1"), 1)
    assert again["consumed_samples"] == 16


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "record").write_text("in the way")
    flat = (
        MODEL | TRAINING | ADAMW | {"save": str(tmp_path), "checkpoint_factor": 1, "train_iters": 1, "data_path": "x"}
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        record.keep_record(config_from_dict(flat), Mesh(), Progress())
    finally:
        torch.distributed.destroy_process_group()
    assert "the record of the run cannot be written (" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_changed_code_is_kept_as_a_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", str(tmp_path / "code"), *identity, *words], check=True, capture_output=True)

    (tmp_path / "code" / "neox").mkdir(parents=True)
    file = tmp_path / "code" / "neox" / "versions.py"
    monkeypatch.setattr(versions, "__file__", str(file))
    commit = versions.commit.__wrapped__
    assert (commit(), versions.changes(1000)) == (None, None)
    file.write_text("one\n")
    git("init", "--initial-branch", "main")
    git("add", ".")
    git("commit", "-m", "first")
    assert not commit().endswith("+")
    assert versions.changes(1000) is None
    file.write_text("two\n")
    assert commit().endswith("+")
    patch = versions.changes(1000)
    assert "-one\n+two\n" in patch
    assert versions.changes(10) is None
    git("checkout", ".")
    subprocess.run(["git", "-C", str(tmp_path / "code"), "apply"], input=patch.encode(), check=True)
    assert file.read_text() == "two\n"


def test_gpus_and_hosts() -> None:
    ranks = [{"host": host, "device": "H100", "driver": "570.1"} for host in ("n1", "n1", "n2")]
    assert record.hosts_of(ranks) == {
        "n1": {"ranks": [0, 1], "devices": ["H100", "H100"], "driver": "570.1"},
        "n2": {"ranks": [2], "devices": ["H100"], "driver": "570.1"},
    }
    mesh = SimpleNamespace(device=torch.device("cpu"))
    assert record._own_place(mesh)["device"] == "cpu"  # type: ignore[arg-type]


NAMES = """WANDB_API_KEY HF_TOKEN AWS_SECRET_ACCESS_KEY PGPASSWORD DB_PWD my_passphrase GOOGLE_CREDENTIALS
    GITHUB_PAT MYSQL_PW APP_CRED BEARER
    HTTP_AUTHORIZATION COOKIE SENTRY_DSN SLACK_WEBHOOK SLACK_HOOK_URL STORAGE_CONNECTION_STRING BLOB_SAS CI_JOB_JWT"""


@pytest.mark.parametrize("name", NAMES.split())
def test_secrets_by_name(name: str) -> None:
    assert masked_variables({name: "value", "PATH": "/bin"}) == {name: "***", "PATH": "/bin"}


def test_what_is_no_secret_is_kept() -> None:
    values = {"num_key_value_heads": 4, "eod_token": "x", "vocab_file": "/srv/hf_tokenizer_of_ours/tokenizer.json"}
    assert masked_values(values) == values
    environ = {
        "TOKENIZERS_PARALLELISM": "false",
        "PWD": "/srv/x",
        "OLDPWD": "/",
        "PATH": "/bin",
        "NCCL_DEBUG": "INFO",
        "HF_TOKEN": "",
    }
    assert masked_variables(environ) == dict(sorted(environ.items()))
    for text in ("tokenizer_type: HFTokenizer", "loss per token is low", "s3://bucket/prefix", "eod_mask_loss: true"):
        assert masked_text(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@proxy:3128/", "https://***@proxy:3128/"),
        ("redis://:pw@cache", "redis://***@cache"),
        ("https://x.org/a?b=1&sig=abc&c=2", "https://x.org/a?b=1&sig=***&c=2"),
        ("X=Name=a;AccountKey=Zm9v==;Suffix=b", "X=Name=a;AccountKey=***"),
        ("train.py wandb_api_key=abc123 train_iters=5", "train.py wandb_api_key=*** train_iters=5"),
        ("train.py --api-key abc123 --x", "train.py --api-key *** --x"),
        ('{"password": "a b", "x": 1}', '{"password": "***", "x": 1}'),
        ("use hf_abcdefghijklmnop now", "use *** now"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("smtp://me:p@ss/word@host:25/x", "smtp://***@host:25/x"),
        ("train.py --token abc --password 'a b' --x", "train.py --token *** --password *** --x"),
        ("-H 'Authorization: Bearer abcdefgh'", "-H 'Authorization: Bearer ***'"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nx", "***\nx"),
        ("https://hooks.slack.com/services/T0/B0/XX", "https://hooks.slack.com/services/***"),
    ],
)
def test_secrets_in_texts(text: str, shown: str) -> None:
    assert masked_text(text) == shown
