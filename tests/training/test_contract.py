"""What a resumed run prints before it goes on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from scripts_of import fork_script
from training.layouts import ADAMW, MODEL, TRAINING, write_corpus
from training.test_resume import train

from neox.checkpoint.native.store import NativeReader
from neox.config import config_from_dict
from neox.training.contract import contract


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Settings of a run of two steps with dropout, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    corpus = write_corpus(folder / "first_text_document", documents=10)
    save = folder / "save"
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "train_iters": 2, "hidden_dropout": 0.1}
    flat |= {"save": str(save), "checkpoint_factor": 2, "load": str(save), "train_batch_size": 4, "lr_decay_iters": 10}
    run_ranks(train, 1, flat, 1)
    return flat, save / "global_step2"


def lines_of(run: tuple[dict[str, Any], Path], world_size: int = 1, **changes: Any) -> list[str]:
    flat, folder = run
    return contract(config_from_dict(flat | changes, world_size=world_size), NativeReader(folder))


def test_the_same_run_goes_on_exactly(run: tuple[dict[str, Any], Path]) -> None:
    assert lines_of(run) == [
        f"resume {run[1]}: iteration 2, 8 samples consumed",
        "  exact: iteration, learning rate, weights, optimizer state, order of samples, random numbers",
    ]


def test_another_layout_draws_other_dropout_and_adds_in_another_order(run: tuple[dict[str, Any], Path]) -> None:
    layout = {"model_parallel_size": 2, "pipe_parallel_size": 2, "zero_optimization": {"stage": 1}}
    assert lines_of(run, 4, **layout) == [
        f"resume {run[1]}: iteration 2, 8 samples consumed",
        "  differs: layout: pipeline 1 x data 1 x tensor 1, ZeRO 0 -> pipeline 2 x data 1 x tensor 2, ZeRO 1",
        "  exact: iteration, learning rate, weights, optimizer state, order of samples",
        "  not exact: dropout: new random streams, as the layout is another",
        "  not exact: sums: added up in another order or precision, equal to rounding",
    ]
    quiet = lines_of(run, 2, model_parallel_size=2, hidden_dropout=0.0)
    assert not any("dropout: new" in line for line in quiet)


def test_a_batch_that_grows_with_the_processes_is_told(run: tuple[dict[str, Any], Path]) -> None:
    """Where the configuration has the batch of a process, as most have."""
    lines = lines_of(run, 2, train_batch_size=None, train_micro_batch_size_per_gpu=4)
    assert "  differs: train_batch_size: 4 -> 8" in lines
    assert not any("exact" in line and "order of samples" in line for line in lines if "not exact" not in line)
    same = lines_of(run, 2, train_batch_size=None, train_micro_batch_size_per_gpu=2)
    assert not any("train_batch_size:" in line for line in same)


def test_changed_keys_are_told_with_both_values(run: tuple[dict[str, Any], Path]) -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    lines = lines_of(run, optimizer=optimizer, seed=7, train_batch_size=8, log_interval=3, use_wandb=False)
    assert "  differs: optimizer.params.lr: 0.003 -> 0.001" in lines
    assert "  differs: seed: 1234 -> 7" in lines
    assert "  differs: train_batch_size: 4 -> 8" in lines
    assert not any("log_interval" in line or "wandb" in line for line in lines)
    assert "  not exact: learning rate: it goes on at the saved step of the schedule that is configured now" in lines
    assert "  not exact: order of samples: seed changed, so samples may come again or be left out" in lines


def test_defaults_spelt_out_are_no_change(run: tuple[dict[str, Any], Path]) -> None:
    assert lines_of(run, seed=1234, rotary_emb_base=10000, train_micro_batch_size_per_gpu=4) == lines_of(run)


def test_a_longer_run_says_when_the_order_stays(run: tuple[dict[str, Any], Path]) -> None:
    lines = lines_of(run, train_iters=10)
    assert "  differs: train_iters: 2 -> 10" in lines
    assert (
        "  not exact: order of samples: the same if the data are passed as many times with the new train_iters" in lines
    )


def test_whole_documents_come_in_another_order_in_a_longer_run(run: tuple[dict[str, Any], Path]) -> None:
    """Their order is drawn from the number of samples."""
    lines = lines_of(run, train_iters=10, pack_impl="pack_until_overflow")
    assert (
        "  not exact: order of samples: pack_impl, train_iters changed, so samples may come again or be left out"
        in lines
    )


def test_other_data_are_noticed_and_moved_ones_are_not(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    flat, _ = run
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{flat['data_path']}{suffix}", tmp_path / f"moved_text_document{suffix}")
    assert lines_of(run, data_path=str(tmp_path / "moved_text_document")) == lines_of(run)
    other = write_corpus(tmp_path / "other_text_document", documents=10, first=10)
    lines = lines_of(run, data_path=other)
    line = next(line for line in lines if line.startswith("  differs: data_path: "))
    assert line.endswith(f"({other})")
    assert line.count("bytes of tokens") == 2
    assert "  not exact: order of samples: the data changed, so samples may come again or be left out" in lines


@pytest.mark.parametrize("key", ["no_load_optim", "no_load_rng"])
def test_what_is_not_loaded_is_not_promised(run: tuple[dict[str, Any], Path], key: str) -> None:
    lines = lines_of(run, **{key: True})
    told = {"no_load_optim": "optimizer: starts afresh", "no_load_rng": "dropout: new random streams"}[key]
    assert any(f"not exact: {told} ({key})" in line for line in lines)
    assert {"no_load_optim": "optimizer state", "no_load_rng": "random numbers"}[key] not in lines[-2]


def test_another_version_of_the_code_is_told(run: tuple[dict[str, Any], Path]) -> None:
    flat, folder = run
    reader = NativeReader(folder)
    environment = reader.manifest.environment
    assert torch.__version__.startswith(environment["packages"]["torch"].partition("+")[0])
    older = environment | {"commit": "0123456789ab", "packages": environment["packages"] | {"torch": "2.4.1"}}
    reader.manifest = replace(reader.manifest, environment=older)
    lines = contract(config_from_dict(flat), reader)
    assert any(line.startswith("  differs: torch: 2.4.1 -> 2.") for line in lines)
    assert any(line.startswith("  differs: code: 0123456789ab -> ") for line in lines)
    reader.manifest = replace(reader.manifest, environment={})
    assert "  differs: code, packages and data: not recorded in the checkpoint" in contract(
        config_from_dict(flat), reader
    )


def test_a_change_of_precision_is_told(run: tuple[dict[str, Any], Path]) -> None:
    lines = lines_of(run, precision="bfloat16")
    assert "  differs: precision: fp32 -> bfloat16" in lines
    assert any(line.startswith("  exact:") and "fp32 master weights" in line for line in lines)


def test_it_is_printed_once_by_the_script(run: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    flat, folder = run
    (tmp_path / "run.yml").write_text(json.dumps(flat))
    words = [tmp_path / "run.yml", "train_iters=3", "model_parallel_size=2", f"save={tmp_path / 'save'}"]
    done = fork_script("train.py", *words, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"resume {folder}: iteration 2, 8 samples consumed") == 1
    assert done.stderr.count("  not exact: dropout: new random streams") == 1
