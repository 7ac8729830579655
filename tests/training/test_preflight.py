"""What is looked at before a run, and what is said of it."""

from pathlib import Path
from typing import Any

import pytest
from training.layouts import ADAMW, MODEL, TRAINING
from training.preferences import pairs

from neox.config import Config, config_from_dict
from neox.launch.variables import RESTARTS
from neox.training import preflight


def settings(**keys: Any) -> Config:
    return config_from_dict(MODEL | TRAINING | ADAMW | keys)


def test_a_store_is_asked_at_the_first_start_alone(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is out of reach when a run is started again ends it as little as one that fails at a save."""
    asked: list[str] = []
    monkeypatch.setattr(preflight, "check_store", lambda *_: asked.append("whether it can be used"))
    monkeypatch.setattr(preflight, "check_copies", lambda *_, **__: asked.append("what it holds"))
    config = settings(data_path=corpus)
    preflight.prepare(config)
    assert asked == ["whether it can be used", "what it holds"]
    monkeypatch.setenv(RESTARTS, "1")
    preflight.prepare(config)
    assert len(asked) == 2


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


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"checkpoint_factor": 10, "keep_last_n_checkpoints": 2},
            "checkpoint_factor, keep_last_n_checkpoints have no effect: save is not set, so no checkpoint is written",
        ),
        ({"load_fallback": True}, "load_fallback has no effect: load is not set"),
        ({"checkpoint_num_layers": 2}, "checkpoint_num_layers has no effect: checkpoint_activations is false"),
        ({"on_large_gradient": "stop"}, "on_large_gradient has no effect: gradient_norm_limit is not set"),
        ({"on_loss_spike": "skip"}, "on_loss_spike has no effect: loss_spike_deviations is not set"),
        ({"on_replica_mismatch": "rewind"}, "on_replica_mismatch has no effect: replica_check_interval is 0"),
        ({"allow_chopped": False}, "allow_chopped has no effect: pack_impl packed cuts documents"),
        ({"comet_tags": ["a"]}, "comet_tags has no effect: use_comet is not true"),
        (
            {"profile": True, "profile_step_start": 5000, "profile_step_stop": 5001, "train_iters": 20},
            "profile has no effect: profile_step_start 5000 is above train_iters 20",
        ),
        (
            {"wandb_group": "a", "wandb_host": "https://api.example.invalid"},
            "wandb_group has no effect: use_wandb is not set, and no key for https://api.example.invalid is found",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keys_that_do_nothing_are_said(keys: dict[str, Any], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_LOCAL"):
        monkeypatch.delenv(name, raising=False)
    assert [found for found in preflight.remarks(settings(**keys)) if "no effect" in found] == [line]


def test_keys_at_their_defaults_are_not_said() -> None:
    keys = {"checkpoint_num_layers": 1, "save_hf": False, "allow_chopped": True, "on_large_gradient": "skip"}
    assert not [found for found in preflight.remarks(settings(**keys)) if "no effect" in found]


def test_tuning_of_fresh_weights_is_said(tmp_path: Path) -> None:
    for keys in ({"lora": {"rank": 2}}, pairs(tmp_path) | {"train_impl": "dpo", "pack_impl": "unpacked"}):
        (line,) = (line for line in preflight.remarks(settings(**keys)) if "fresh weights" in line)
        assert line.startswith(("lora: load is not set, so it begins from", "train_impl dpo: load is not set"))
        assert not [line for line in preflight.remarks(settings(**keys, load="run")) if "fresh weights" in line]
