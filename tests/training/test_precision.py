"""Half precision: bf16 follows one process; fp16 skips overflows everywhere at once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING, Curve, allow_fp16_on_cpu, curve_of

from neox.config import config_from_dict
from neox.data import build_datasets
from neox.parallel.mesh import build_mesh
from neox.training.loop import Run, training_loop
from neox.training.run import batch_maker, start_or_resume, train_loader
from neox.training.schedule import LRSchedule

BF16 = {"precision": "bfloat16"}
BF16_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"model_parallel_size": 2}),
    "tp2_sp": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 4}),
    "pp2_tp2": (4, {"pipe_parallel_size": 2, "model_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "zero1": (2, {"zero_optimization": {"stage": 1}}),
    "zero2": (2, {"zero_optimization": {"stage": 2}}),
    "zero3": (2, {"zero_optimization": {"stage": 3}}),
    "accumulation4": (1, {"gradient_accumulation_steps": 4}),
}


@pytest.fixture(scope="module")
def bf16_reference(corpus: str) -> Curve:
    return curve_of(MODEL | TRAINING | ADAMW | BF16 | {"data_path": corpus}, 1)


@pytest.mark.parametrize("layout", BF16_LAYOUTS)
def test_bf16_layout_follows_one_process(corpus: str, bf16_reference: Curve, layout: str) -> None:
    world_size, changes = BF16_LAYOUTS[layout]
    found = curve_of(MODEL | TRAINING | ADAMW | BF16 | {"data_path": corpus} | changes, world_size)
    assert bf16_reference.losses[0] - min(bf16_reference.losses) > 1.0
    np.testing.assert_allclose(found.losses, bf16_reference.losses, rtol=0, atol=5e-3)


def test_bf16_keeps_fp32_masters(corpus: str, bf16_reference: Curve) -> None:
    """With updates far below bf16's resolution of the weights, only fp32 masters can add them up."""
    small = {"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}, "warmup": 0.0, "lr_decay_style": "constant"}
    flat = MODEL | TRAINING | small | {"data_path": corpus, "train_iters": 20}
    fp32, bf16 = curve_of(flat, 1), curve_of(flat | BF16, 1)
    name = "layers.2.mlp.linear1.weight"
    assert np.abs(bf16.weights[name] - fp32.weights[name]).mean() < 2e-4
    np.testing.assert_allclose(bf16.losses[-1] - bf16.losses[0], fp32.losses[-1] - fp32.losses[0], atol=1e-2)


FP16_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "zero1_dp2": (2, {"zero_optimization": {"stage": 1}}),
    "zero2_dp2": (2, {"zero_optimization": {"stage": 2}}),
    "zero3_dp2": (2, {"zero_optimization": {"stage": 3}}),
    "tp2": (2, {"model_parallel_size": 2}),
    "pp2": (2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "offload": (
        1,
        {
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            "data_types": {"grad_accum_dtype": "fp32"},
        },
    ),
}


@pytest.mark.parametrize("layout", FP16_LAYOUTS)
def test_fp16_overflow_skips_on_all_ranks(corpus: str, layout: str) -> None:
    """A scale of 2^30 overflows fp16 for certain; the run must come down to a scale that works and then learn."""
    world_size, changes = FP16_LAYOUTS[layout]
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 30, "hysteresis": 1, "loss_scale_window": 1000}}
    plain = {key: value for key, value in TRAINING.items() if key != "precision"}
    flat = MODEL | plain | ADAMW | fp16 | {"data_path": corpus, "train_iters": 32, "lr_decay_iters": 60}
    found = curve_of(flat | changes, world_size)
    updates = [i for i, skipped in enumerate(found.skipped) if not skipped]
    first = updates[0]
    assert 5 < first < 27
    # the schedule counts updates, not iterations
    schedule = LRSchedule.from_config(config_from_dict(flat))
    made = np.cumsum([0] + [not skipped for skipped in found.skipped])[:-1]
    assert found.rates == [schedule.lr_at(int(updates_before)) for updates_before in made]
    assert found.rates[first + 2] > found.rates[first]
    # each overflow halves the scale
    assert found.scales[:first] == [2.0**30 / 2 ** (i + 1) for i in range(first)]
    assert found.scales[first] == found.scales[first - 1]
    assert found.losses[-1] < found.losses[0] - 0.3


@pytest.mark.parametrize("layout", ["one", *FP16_LAYOUTS])
def test_an_update_at_which_the_loss_scale_grows_is_whole(corpus: str, layout: str) -> None:
    """A scale that doubles at every second step changes nothing that is learned; powers of two round nothing."""
    world_size, changes = {"one": (1, {}), **FP16_LAYOUTS}[layout]
    plain = {key: value for key, value in TRAINING.items() if key != "precision"}
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}, "gradient_clipping": 100.0}
    flat = MODEL | plain | sgd | changes | {"data_path": corpus, "train_iters": 7}
    grown = curve_of(flat | {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}}, world_size)
    fixed = curve_of(flat | {"fp16": {"enabled": True, "loss_scale": 16}}, world_size)
    assert len(set(grown.scales)) > 3
    assert not any(grown.skipped)
    np.testing.assert_allclose(grown.losses, fixed.losses, rtol=0, atol=2e-4)
    np.testing.assert_allclose(grown.norms, fixed.norms, rtol=5e-3)


def tied_copies(flat: dict[str, Any], world_size: int) -> np.ndarray:
    """The embedding as this stage holds it, after a few steps."""
    config = config_from_dict(flat, world_size=world_size)
    allow_fp16_on_cpu()
    mesh = build_mesh(config)
    engine, progress, schedule = start_or_resume(config, mesh)
    loader = train_loader(config, mesh, build_datasets(config), 0)
    training_loop(Run(engine, loader, batch_maker(config, mesh), schedule, 4), progress, [])
    return engine.parameters()["layers.0.word_embeddings.weight"].detach().float().numpy()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bfloat16"])
def test_tied_ends_of_a_pipeline_stay_equal(corpus: str, precision: str) -> None:
    plain = {key: value for key, value in TRAINING.items() if key != "precision"}
    layout = {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2, "no_weight_tying": False}
    scale = {"fp16": {"enabled": True, "initial_scale_power": 8}} if precision == "fp16" else {"precision": precision}
    flat = MODEL | plain | ADAMW | layout | scale | {"data_path": corpus}
    first, last = run_ranks(tied_copies, 2, flat, 2)
    np.testing.assert_array_equal(first, last)


def test_resuming_from_before_the_first_update(corpus: str, tmp_path: Path) -> None:
    """fp16 runs begin with skipped steps; a checkpoint from then has no moments yet."""
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "train_iters": 3, "log_interval": 1}
    whole = flat | {"save": str(tmp_path / "whole"), "extra_save_iters": [0]}
    run_ranks(train_run, 1, whole, 1)
    again = flat | {"save": str(tmp_path / "again"), "checkpoint_factor": 9, "load": whole["save"], "iteration": 0}
    run_ranks(train_run, 1, again, 1)

    def losses(folder: str) -> list[float]:
        records = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        return [record["train/lm_loss"] for record in records]

    assert losses("again") == losses("whole")


def test_a_loss_scale_goes_on_where_there_is_one(corpus: str, tmp_path: Path) -> None:
    """A scale that moves goes on; one that is fixed is the configuration's; other precisions have none."""
    dynamic = {"fp16": {"enabled": True, "initial_scale_power": 10, "hysteresis": 1, "loss_scale_window": 2}}
    plain = {key: value for key, value in TRAINING.items() if key != "precision"}
    flat = MODEL | plain | ADAMW | {"data_path": corpus, "train_iters": 6}
    whole = curve_of(flat | dynamic, 1)
    run_ranks(train_run, 1, flat | dynamic | {"save": str(tmp_path), "extra_save_iters": [3], "exit_interval": 3}, 1)
    resumed: dict[str, tuple[dict[str, Any], list[float | None]]] = {
        "dynamic": (dynamic, whole.scales[3:]),
        "fixed": ({"fp16": {"enabled": True, "loss_scale": 64}}, [64.0] * 3),
        "fp32": ({"precision": "fp32"}, [None] * 3),
        "bfloat16": ({"precision": "bfloat16"}, [None] * 3),
    }
    assert len(set(whole.scales)) == 3
    for name, (changes, scales) in resumed.items():
        found = curve_of(flat | changes | {"load": str(tmp_path)}, 1)
        assert found.scales == scales, name
        np.testing.assert_allclose(found.losses, whole.losses[3:], rtol=0, atol=5e-3, err_msg=name)


def train_run(flat: dict[str, Any], world_size: int) -> None:
    from neox.training.run import train

    torch.set_num_threads(1)
    if "fp16" in flat:
        allow_fp16_on_cpu()
    train(config_from_dict(flat, world_size=world_size))
