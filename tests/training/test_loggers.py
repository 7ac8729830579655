"""Metrics reach every place they should, in the form they should; optional packages are stood in for."""

import importlib
import json
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from neox.errors import ConfigError
from neox.training.metrics import loggers, services
from neox.training.metrics.loggers import BarSink, JsonLinesSink, LineSink, MetricLog, console_lines
from neox.training.metrics.services import wants_wandb
from neox.training.validation import perplexity

TRAIN = {
    "train/lm_loss": 2.25,
    "train/learning_rate": 6e-4,
    "train/loss_scale": 4096.0,
    "train/skipped_iterations": 1,
    "train/nan_iterations": 0,
    "runtime/samples_per_sec": 1.234,
    "runtime/iteration_time": 0.0123,
    "runtime/tokens_per_sec": 2527.0,
    "runtime/flops_per_sec_per_gpu": 1.2e12,
}


@pytest.fixture
def config(tmp_path):
    def build(*, save=None, log_dir=None, tensorboard_dir=None, use_wandb=False, all_ranks=False, comet=None):
        names = ("wandb_project", "wandb_team", "wandb_group", "wandb_run_name", "wandb_host")
        values = ("neox", "eleuther", "sweep", "run1", "https://wandb.example.org")
        logging = SimpleNamespace(
            log_dir=log_dir,
            tensorboard_dir=tensorboard_dir,
            use_wandb=use_wandb,
            wandb_init_all_ranks=all_ranks,
            use_comet=comet is not None,
            **(comet or {}),
            **dict(zip(names, values, strict=True)),
        )
        return SimpleNamespace(
            checkpoint=SimpleNamespace(save=save and str(tmp_path / save)),
            logging=logging,
            training=SimpleNamespace(train_iters=100),
            to_flat=lambda: {"num_layers": 2},
        )

    return build


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines(tmp_path):
    sink = JsonLinesSink(tmp_path / "new" / "metrics.jsonl")
    sink.log(1, {"train/lm_loss": 2.5, "train/skipped_iterations": 0})
    sink.log(2, {"a": math.nan, "b": math.inf, "c": -math.inf})
    first, second = read(tmp_path / "new" / "metrics.jsonl")  # before close: each line is written at once
    assert first["step"] == 1
    assert first["train/lm_loss"] == 2.5
    assert first["time"] > 1.7e9
    assert [second[name] for name in "abc"] == ["NaN", "Infinity", "-Infinity"]
    assert math.isnan(float(second["a"]))
    assert float(second["c"]) == -math.inf


def test_json_lines_resume_after_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tra')
    JsonLinesSink(path).log(2, {"x": 1.0})
    lines = path.read_text().splitlines()
    assert lines[:2] == ['{"step": 1}', '{"step": 2, "tra']
    assert json.loads(lines[2])["x"] == 1.0


def test_json_lines_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="change save or log_dir"):
        JsonLinesSink(tmp_path / "file" / "metrics.jsonl")


def test_console_line_is_upstreams():
    (line,) = console_lines(10, 100, TRAIN)
    assert line == (
        " samples/sec: 1.234 | iteration       10/     100 | elapsed time per iteration (ms): 12.3 |"
        " learning rate: 6.000E-04 | approx flops per GPU: 1.2TFLOPS | lm_loss: 2.250000E+00 |"
        " loss scale: 4096.0 | number of skipped iterations:   1 | number of nan iterations:   0 |"
    )


def test_console_line_with_utilization_and_other_objectives():
    metrics = {
        "train/margin": 0.5,
        "runtime/model_flops_utilization": 0.41,
        "runtime/hardware_flops_utilization": 0.5,
    }
    (line,) = console_lines(3, None, metrics | {"parameter_norms/x": 1.0})
    assert line == " iteration        3 | MFU: 41.0% | HFU: 50.0% | margin: 5.000000E-01 |"


def test_console_lines_of_evaluations():
    metrics = {"validation/lm_loss": 1.0, "validation/lm_loss_ppl": math.e, "test/lm_loss": math.nan}
    assert console_lines(20, 100, metrics) == [
        " validation results at iteration 20 | lm_loss: 1.000000E+00 | lm_loss_ppl: 2.718282E+00 |",
        " test results at iteration 20 | lm_loss: NAN |",
    ]
    assert len(console_lines(20, 100, metrics | TRAIN)) == 3
    timers = {"timers/forward": 0.25, "timers/batch generator": 1e-5}
    assert console_lines(20, 100, timers) == ["time (ms) | forward: 250.00 | batch generator: 0.01"]
    assert console_lines(20, 100, {"gradient_norms/layers.2.mlp.linear1.weight": 1.0}) == []


def test_lines_or_bar(monkeypatch):
    def kinds(*, stderr, stdout):
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: stderr))
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: stdout))
        return [type(sink) for sink in loggers.console_sinks(10)]

    assert kinds(stderr=True, stdout=True) == [BarSink]
    assert kinds(stderr=True, stdout=False) == [BarSink, LineSink]
    assert kinds(stderr=False, stdout=True) == [LineSink]


def test_bar(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    sink = BarSink(100)
    sink.progress(40)
    sink.log(41, TRAIN)
    sink.log(41, {"validation/lm_loss": 1.0})
    sink.progress(50)
    task = sink.bar.tasks[0]
    assert (task.completed, task.total) == (50, 100)
    assert task.fields["status"] == "loss 2.250  lr 6.00e-04  2,527 tokens/s"
    # Reckoned from where the run began, not from 0: the time left rests on 10 steps, not on 50.
    assert len(task._progress) == 1
    sink.close()
    shown = capsys.readouterr()
    assert "validation results at iteration 41 | lm_loss: 1.000000E+00 |" in shown.err
    assert shown.out == ""


def test_other_ranks_log_nothing(config, tmp_path, capsys):
    with MetricLog.from_config(config(save="ckpt", use_wandb=True), rank=1, environ={}) as log:
        log.log(1, TRAIN)
        log.progress(1)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["save", "log_dir", "current"])
def test_where_the_file_goes(config, tmp_path, monkeypatch, kind, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {"save": {"save": "ckpt", "log_dir": "logs"}, "log_dir": {"log_dir": "logs"}, "current": {}}[kind]
    with MetricLog.from_config(config(**settings), rank=0, environ={"NETRC": str(tmp_path / "none")}) as log:
        log.log(7, TRAIN)
    folder = {"save": "ckpt", "log_dir": "logs", "current": "."}[kind]
    (record,) = read(tmp_path / folder / "metrics.jsonl")
    assert {name: record[name] for name in TRAIN} == TRAIN
    assert "iteration        7/     100 |" in capsys.readouterr().out


def test_values_may_be_anything_that_float_takes(tmp_path):
    torch = pytest.importorskip("torch")
    log = MetricLog([JsonLinesSink(tmp_path / "m.jsonl")])
    log.log(1, {"a": torch.tensor(1.5), "b": 2})
    record = read(tmp_path / "m.jsonl")[0]
    assert (record["a"], record["b"]) == (1.5, 2)


@pytest.fixture
def no_optional_packages(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(importlib, "import_module", refuse)


def test_missing_tensorboard(config, tmp_path, no_optional_packages):
    with pytest.raises(ConfigError) as error:
        MetricLog.from_config(config(save="c", tensorboard_dir=str(tmp_path / "tb")), rank=0, environ={})
    assert "tensorboard_dir is set but" in str(error.value)
    assert "pip install tensorboard, or unset tensorboard_dir" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_wandb(config, no_optional_packages):
    with pytest.raises(ConfigError, match="use_wandb is set but wandb is not installed: pip install wandb"):
        MetricLog.from_config(config(save="c", use_wandb=True), rank=0, environ={})


class FakeWriter:
    made: ClassVar = []

    def __init__(self, log_dir):
        self.log_dir, self.scalars, self.closed = log_dir, [], False
        FakeWriter.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard(config, tmp_path, monkeypatch):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    folder = str(tmp_path / "tb")
    with MetricLog.from_config(config(save="c", tensorboard_dir=folder), rank=0, environ={}) as log:
        log.log(3, {"train/lm_loss": 2.0, "test/lm_loss": 1.0})
    writer = FakeWriter.made.pop()
    assert (writer.log_dir, writer.closed) == (folder, True)
    assert writer.scalars == [("train/lm_loss", 2.0, 3), ("test/lm_loss", 1.0, 3)]


class FakeWandb(ModuleType):
    class Error(Exception):
        pass

    class CommError(Error):
        pass

    class AuthenticationError(CommError):
        pass

    errors = SimpleNamespace(CommError=CommError, AuthenticationError=AuthenticationError)

    def __init__(self, *, refuse=False):
        super().__init__("wandb")
        self.refuse, self.settings, self.logged, self.finished = refuse, None, [], False

    def Settings(self, **settings):
        return settings

    def init(self, **settings):
        if self.refuse:
            raise self.Error("api_key not configured (no-tty).\nmore lines")
        self.settings = settings
        return SimpleNamespace(
            log=lambda metrics, step: self.logged.append((step, metrics)),
            finish=lambda: setattr(self, "finished", True),
        )


def test_wandb(config, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with MetricLog.from_config(config(save="c", use_wandb=True), rank=0, environ={}) as log:
        log.log(3, {"train/lm_loss": 2.0})
    assert wandb.settings == {
        "project": "neox",
        "entity": "eleuther",
        "group": "sweep",
        "name": "run1",
        "config": {"num_layers": 2},
        "settings": {"base_url": "https://wandb.example.org"},
    }
    assert wandb.logged == [(3, {"train/lm_loss": 2.0})]
    assert wandb.finished


def test_wandb_refusal_is_one_line(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuse=True))
    with pytest.raises(ConfigError) as error:
        MetricLog.from_config(config(save="c", use_wandb=True), rank=0, environ={})
    assert str(error.value).startswith("Weights & Biases: api_key not configured (no-tty).: run `wandb login`")
    assert "\n" not in str(error.value)


def test_wandb_runs_of_all_ranks(config, monkeypatch):
    for rank in range(2):
        wandb = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        settings = config(save="c", use_wandb=True, all_ranks=True)
        with MetricLog.from_config(settings, rank=rank, environ={}) as log:
            log.log(3, {"train/lm_loss": 2.0})
        assert (wandb.settings["name"], wandb.settings["group"]) == (f"run1-rank{rank}", "sweep")
        assert wandb.logged == [(3, {"train/lm_loss": 2.0})]
        assert len(log.sinks) == (3 if rank == 0 else 1)


COMET = {
    "comet_workspace": "team",
    "comet_project": "neox",
    "comet_experiment_name": "run1",
    "comet_tags": ("a", "b"),
    "comet_others": {"cluster": "x"},
}


def test_comet(config, monkeypatch):
    calls = []

    class Experiment:
        def __getattr__(self, name):
            return lambda *values, **options: calls.append((name, *values, *options.values()))

    comet = ModuleType("comet_ml")
    comet.start = lambda **settings: calls.append(("start", settings)) or Experiment()
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    with MetricLog.from_config(config(save="c", comet=COMET), rank=0, environ={"NETRC": "none"}) as log:
        log.log(3, {"train/lm_loss": 2.0})
    assert calls == [
        ("start", {"workspace": "team", "project": "neox"}),
        ("set_name", "run1"),
        ("add_tags", ["a", "b"]),
        ("log_others", {"cluster": "x"}),
        ("log_parameters", {"num_layers": 2}),
        ("log_metrics", {"train/lm_loss": 2.0}, 3),
        ("end",),
    ]


def test_comet_that_is_missing_or_refuses(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(ConfigError, match="use_comet is set but comet_ml is not installed: pip install comet_ml"):
        MetricLog.from_config(config(save="c", comet=COMET), rank=0, environ={})

    def refuse(**_):
        raise ValueError("no API key.\nmore lines")

    monkeypatch.setattr(services, "_answers", lambda address: True)
    comet = ModuleType("comet_ml")
    comet.start = refuse
    monkeypatch.setitem(sys.modules, "comet_ml", comet)
    with pytest.raises(ConfigError) as error:
        MetricLog.from_config(config(save="c", comet=COMET), rank=0, environ={})
    assert str(error.value).startswith("Comet: no API key.: set COMET_API_KEY")
    assert "\n" not in str(error.value)


def test_when_wandb_is_wanted(tmp_path):
    host = "https://api.wandb.ai"
    key_file = tmp_path / "netrc"
    nothing = {"NETRC": str(key_file)}
    assert wants_wandb(True, host=host, environ=nothing)
    assert not wants_wandb(False, host=host, environ={"WANDB_API_KEY": "k"})
    assert not wants_wandb(None, host=host, environ=nothing)
    assert wants_wandb(None, host=host, environ=nothing | {"WANDB_API_KEY": "k"})
    key_file.write_text("machine api.wandb.ai login user password k\n")
    key_file.chmod(0o600)
    assert wants_wandb(None, host=host, environ=nothing)
    assert not wants_wandb(None, host="https://other.example.org", environ=nothing)


def test_perplexity_of_a_loss_that_is_no_number_is_none_either() -> None:
    assert math.isnan(perplexity(math.nan))
    assert [perplexity(0.0), perplexity(1e4)] == [1.0, math.inf]
