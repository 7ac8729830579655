"""Weights & Biases and Comet out of reach, or refusing: a run trains where nobody's mistake is in the way."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import Config, config_from_dict
from neox.errors import ConfigError
from neox.training.metrics import services
from neox.training.metrics.services import CometSink, WandbSink, wandb_sinks

KEY = {"WANDB_API_KEY": 40 * "7"}


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights & Biases with a key, in a folder of the test, and soon at the end of its patience."""
    import wandb

    wandb.teardown()  # it reads its variables once
    monkeypatch.setattr(services, "SECONDS_TO_ANSWER", 1.0)
    variables = {"WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true", "WANDB_INIT_TIMEOUT": "1", "no_proxy": "127.0.0.1"}
    for name, value in (KEY | variables).items():
        monkeypatch.setenv(name, value)
    yield
    wandb.teardown()


@pytest.fixture
def refused() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture
def hanging() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def refusing() -> Iterator[str]:
    """A server that knows nobody."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"errors": [{"message": "user is not logged in"}]}')

        do_GET = do_POST

        def log_message(self, *arguments: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def settings(**keys: Any) -> Config:
    return config_from_dict(MODEL | TRAINING | ADAMW | keys)


def test_a_server_that_nobody_asked_for_and_that_hangs(hanging: str, caplog: pytest.LogCaptureFixture) -> None:
    assert wandb_sinks(settings(wandb_host=hanging), rank=0, environ=KEY) == []
    (line,) = [record.getMessage() for record in caplog.records if record.name == services.__name__]
    assert "training continues without it, as use_wandb is not set" in line
    assert "\n" not in line


def test_a_key_that_nobody_asked_for_and_that_is_wrong(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert wandb_sinks(settings(wandb_host=refused), rank=0, environ={"WANDB_API_KEY": "short"}) == []


def test_what_nobody_asked_for_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(services.importlib, "import_module", refuse)
    assert wandb_sinks(settings(), rank=0, environ=KEY) == []
    with pytest.raises(ConfigError, match="not installed"):
        wandb_sinks(settings(use_wandb=True), rank=0, environ={})


def test_a_run_that_was_asked_for_is_kept_on_disk_while_the_server_is_out_of_reach(
    refused: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sink,) = wandb_sinks(settings(wandb_host=refused, use_wandb=True), rank=0, environ={})
    sink.log(1, {"train/lm_loss": 4.5})
    sink.close()
    (run,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert run.stat().st_size > 0
    (line,) = [record.getMessage() for record in caplog.records if record.name == services.__name__]
    assert "out of reach" in line
    assert "wandb sync" in line


def test_a_server_that_refuses_the_key_is_a_mistake_where_it_was_asked_for(refusing: str) -> None:
    with pytest.raises(ConfigError, match="wandb login") as error:
        WandbSink(settings(wandb_host=refusing, use_wandb=True))
    assert "\n" not in str(error.value)


class Comet(SimpleNamespace):
    """Comet's package, with a server that is out of reach or refuses."""

    def start(self, *, online: bool = True, **place: Any) -> SimpleNamespace:
        if online:
            raise ValueError("no experiment\nmore")
        self.place = place
        nothing = dict.fromkeys(("set_name", "add_tags", "log_others", "log_parameters"), lambda given: None)
        return SimpleNamespace(**nothing)


def test_comet_out_of_reach_and_comet_that_refuses(
    refused: str, refusing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    comet = Comet()
    monkeypatch.setattr(services, "optional_import", lambda *_, **__: comet)
    monkeypatch.setenv("COMET_URL_OVERRIDE", refused)
    CometSink(settings(use_comet=True, comet_project="neox"))
    assert comet.place == {"workspace": None, "project": "neox"}
    monkeypatch.setenv("COMET_URL_OVERRIDE", refusing)
    with pytest.raises(ConfigError, match="COMET_API_KEY") as error:
        CometSink(settings(use_comet=True))
    assert "\n" not in str(error.value)
