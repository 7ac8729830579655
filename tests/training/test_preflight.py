"""What is looked at before a run, and what is said of it."""

from pathlib import Path
from typing import Any

import pytest
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import Config, config_from_dict
from neox.launch.variables import RESTARTS
from neox.training import preflight


def settings(**keys: Any) -> Config:
    return config_from_dict(MODEL | TRAINING | ADAMW | keys)


def test_a_store_is_asked_at_the_first_start_alone(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is out of reach when a run is started again ends it as little as one that fails at a save."""
    asked: list[Any] = []
    monkeypatch.setattr(preflight, "check_store", asked.append)
    monkeypatch.setattr(preflight, "check_copies", lambda settings, *lineage, **start: asked.append(settings))
    config = settings(data_path=corpus)
    preflight.prepare(config)
    assert asked == [config.checkpoint] * 2
    monkeypatch.setenv(RESTARTS, "1")
    preflight.prepare(config)
    assert asked == [config.checkpoint] * 2


def test_tokenizer_files_that_are_named_and_missing_are_said(tmp_path: Path) -> None:
    there, missing = tmp_path / "there.json", tmp_path / "missing"
    there.write_text("{}")

    def lines(**keys: Any) -> list[str]:
        return [line for line in preflight.remarks(settings(**keys)) if "_file" in line]

    given = {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": str(there), "merge_file": str(missing)}
    (line,) = lines(**given)
    assert line.startswith(f"merge_file {missing}: no such file")
    (line,) = lines(tokenizer_type="HFTokenizer", vocab_file=str(missing))
    assert line.startswith(f"vocab_file {missing}: no such file")
    assert lines(tokenizer_type="TiktokenTokenizer", vocab_file="cl100k_base") == []
    assert lines() == []
