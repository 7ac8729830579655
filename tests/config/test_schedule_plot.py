"""`python -m neox.config schedule`: the picture shows the run's own rates."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from neox.config import config_from_dict
from neox.config.__main__ import main
from neox.config.learning_rate import LearningRate
from neox.config.schedule_plot import Plan, draw, save_png
from neox.errors import ConfigError, UserError

RUN: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "train_batch_size": 16,
    "train_iters": 128,
    "optimizer": {"type": "Adam", "params": {"lr": 1.0}},
    "lr_decay_style": "linear",
    "warmup": 0.0,
}
BLANK = chr(0x2800)


def rows_of(text: str) -> list[str]:
    return [line.partition("│")[2] for line in text.splitlines() if "│" in line]


def test_linear_decay_is_a_diagonal() -> None:
    text = draw(config_from_dict(RUN, world_size=1))
    assert text.splitlines()[0] == (
        "learning rate: linear, warmup 0 iterations, peak 1, first 1, last 0.00781, 128 iterations"
    )
    rows = rows_of(text)
    assert len(rows) == 14
    # The line goes down from the left end of the first row to the right end of the last.
    starts = [len(row) - len(row.lstrip(BLANK)) for row in rows]
    ends = [len(row.rstrip(BLANK)) for row in rows]
    assert starts[0] == 0
    assert ends[-1] == 64
    assert starts == sorted(starts)
    assert all(end - start <= 6 for start, end in zip(starts, ends, strict=True))
    assert f"tokens seen: {64 * 16 * 32:,} half way, {128 * 16 * 32:,} at the end" in text


def test_the_plan_follows_the_batch_ramp() -> None:
    changes = {"rampup_batch_size": [4, 4, 48], "train_micro_batch_size_per_gpu": 4, "lr_decay_style": "wsd"}
    config = config_from_dict(RUN | changes, world_size=1)
    plan = Plan.from_config(config)
    assert plan.batches[:8] == [4, 4, 4, 4, 8, 8, 12, 12]
    assert plan.batches[-1] == 16
    assert plan.tokens[-1] == 32 * sum(plan.batches)
    assert plan.rates == [LearningRate.from_config(config).lr_at(step) for step in range(128)]
    text = draw(config)
    assert "wsd (last 10%: 1-sqrt)" in text
    assert "batch size, sequences" in text
    assert len(rows_of(text)) == 28


def test_command_draws_and_writes_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "run.yml", tmp_path / "run.png"
    file.write_text(yaml.safe_dump(RUN))
    assert main(["schedule", str(file), "lr_decay_style=cosine", "--png", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "learning rate: cosine" in out
    assert f"written: {picture}" in out
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 5000


def test_no_configuration_becomes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "run.yml", tmp_path / "other.yml"
    file.write_text(yaml.safe_dump(RUN))
    other.write_text("log_interval: 1\n")
    assert main(["schedule", "--png", str(other), str(file), str(other)]) == 2
    assert capsys.readouterr().err.startswith(f"{other}: is read too")
    assert other.read_text() == "log_interval: 1\n"


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = {key: value for key, value in RUN.items() if key != "optimizer"}
    with pytest.raises(ConfigError, match="no learning rate; add optimizer"):
        draw(config_from_dict(without, world_size=1))
    endless = {key: value for key, value in RUN.items() if key != "train_iters"}
    with pytest.raises(ConfigError, match="set train_iters or lr_decay_iters"):
        draw(config_from_dict(endless, world_size=1))
    with pytest.raises(ConfigError, match="1,000,000,000,000 iterations are too many to draw; give 10,000,000 at most"):
        draw(config_from_dict(RUN | {"train_iters": 10**12}, world_size=1))
    with pytest.raises(UserError, match=r"x\.png: cannot be written"):
        save_png(config_from_dict(RUN, world_size=1), Path("/dev/null/x.png"))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        save_png(config_from_dict(RUN, world_size=1), tmp_path / "x.png")
