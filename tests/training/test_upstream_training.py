"""From upstream's initial weights on upstream's batches: upstream's losses, learning rates and gradient norms."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_models import GOLDENS
from ranks import run_ranks

from neox.config import config_from_dict, load_config

RUN = GOLDENS / "a_neox_pp0"


def train_on_batches(flat: dict[str, Any], world_size: int) -> list[tuple[float, float, float]]:
    """Loss, rate after the step, and gradient norm of each step."""
    from neox.checkpoint.open import open_checkpoint
    from neox.checkpoint.weights import weight_source
    from neox.parallel.mesh import build_mesh
    from neox.training.batches import global_batch, micro_batch
    from neox.training.run import build_engine
    from neox.training.schedule import LRSchedule

    torch.set_num_threads(1)
    config = config_from_dict(flat, world_size=world_size)
    mesh = build_mesh(config)
    weights = weight_source(open_checkpoint(RUN / "ckpt", 0))
    engine = build_engine(config, mesh, weights)
    schedule = LRSchedule.from_config(config)
    size = config.batch.train_micro_batch_size_per_gpu
    figures = []
    batches = np.load(RUN / "train_batches.npz")
    for step in range(5):
        rows = batches[f"microbatch_{step}"]
        micro_batches = []
        for number in range(config.batch.gradient_accumulation_steps):
            first = (number * mesh.data_size + mesh.data_rank) * size
            item = {"tokens": torch.from_numpy(rows[first : first + size].astype(np.int64))}
            micro_batches.append(micro_batch(item, device=mesh.device, mask_after=None))
        engine.set_learning_rate(schedule.lr_at(step))
        loss = engine.train_step(global_batch(micro_batches, mesh))
        figures.append((float(loss), schedule.lr_at(step + 1), float(engine.gradient_norm)))
    return figures


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {"model_parallel_size": 2}),
        (2, {"pipe_parallel_size": 2, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4}),
        (2, {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 2}),
    ],
    ids=["one_process", "tp2", "pp2", "zero3"],
)
def test_first_five_steps_are_upstreams(world_size: int, layout: dict[str, Any]) -> None:
    given = load_config([RUN / "a_neox_pp0.yml"], world_size=None).to_flat()
    flat = {key: value for key, value in given.items() if key not in ("vocab_file", "data_path", "save")}
    flat |= {"padded_vocab_size": 512} | layout
    expected = json.loads(Path(RUN / "loss.json").read_text())["steps"]
    found = run_ranks(train_on_batches, world_size, flat, world_size)[0]
    for (loss, rate, norm), step in zip(found, expected, strict=True):
        assert loss == pytest.approx(step["lm_loss"], abs=1e-5)
        assert rate == pytest.approx(step["lr_after_step"][0], rel=1e-6)
        assert norm == pytest.approx(step["grad_norm_before_clip"], abs=1e-5)
