"""Muon against the paper in float64, and the same weights at every layout."""

from typing import Any

import numpy as np
import pytest
import torch
from training.layouts import EPS, MODEL, TRAINING, Curve, curve_of

from neox.config import config_from_dict
from neox.model.build import build_decoder, fresh_weights
from neox.training.optimizers.build import build_optimizer
from neox.training.optimizers.muon import orthogonalize, update_scale

MUON = {
    "optimizer": {"type": "Muon", "params": {"lr": 3e-3, "momentum": 0.9, "adamw_lr": 1e-3, "eps": EPS}},
    "gradient_clipping": 0.5,
    "train_iters": 6,
    "train_batch_size": 12,
}
GROUPED = {"num_kv_heads": 2, "activation": "swiglu", "norm": "rmsnorm", "intermediate_size": 240}
LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tp2": ("plain", 2, {"model_parallel_size": 2}),
    "dp2": ("plain", 2, {}),
    "pp2": ("plain", 2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    # The stage in the middle has blocks alone, and so a parameter group less.
    "pp3": ("deep", 3, {"pipe_parallel_size": 3, "gradient_accumulation_steps": 2}),
    "dp2_zero2": ("grouped", 2, {"zero_optimization": {"stage": 2}}),
    "dp3_zero1": ("grouped", 3, {"zero_optimization": {"stage": 1}}),
    "tp2_dp2_zero1": ("grouped", 4, {"model_parallel_size": 2, "zero_optimization": {"stage": 1}}),
    "dp2_bf16": ("bf16", 2, {}),
}


def settings(corpus: str, family: str) -> dict[str, Any]:
    bf16, deep = {"precision": "bfloat16"}, {"num_layers": 3}
    changes = {"plain": {}, "grouped": GROUPED, "bf16": bf16, "deep": deep}[family]
    return MODEL | TRAINING | MUON | {"data_path": corpus} | changes


@pytest.fixture(scope="module")
def references(corpus: str) -> dict[str, Curve]:
    return {family: curve_of(settings(corpus, family), 1) for family in ("plain", "grouped", "bf16", "deep")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(corpus: str, references: dict[str, Curve], layout: str) -> None:
    family, world_size, changes = LAYOUTS[layout]
    reference, found = references[family], curve_of(settings(corpus, family) | changes, world_size)
    # Weights in bf16 may be rounded to two neighbours of the same number.
    tolerance, spacing = (1e-5, 0.0) if family != "bf16" else (5e-3, 2**-7)
    np.testing.assert_allclose(found.losses, reference.losses, rtol=0, atol=tolerance)
    for name, weight in reference.weights.items():
        np.testing.assert_allclose(found.weights[name], weight, rtol=spacing, atol=tolerance, err_msg=name)


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Jordan et al. 2024, as printed, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for _ in range(5):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def rows_of_matrices(name: str, rows: int, family: str) -> list[list[int]]:
    """Which rows of a fused matrix are one map."""
    if "query_key_value" in name and family == "plain":
        head = rows // 4 // 3
        return [[r for r in range(rows) if r // head % 3 == kind] for kind in range(3)]
    if "query_key_value" in name:
        return [list(range(64)), list(range(64, 96)), list(range(96, 128))]
    if "linear1" in name and family == "grouped":
        return [list(range(rows // 2)), list(range(rows // 2, rows))]
    return [list(range(rows))]


@pytest.mark.parametrize("family", ["plain", "grouped"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_three_steps_are_the_papers(family: str, nesterov: bool) -> None:
    flat = settings("unused", family)
    flat["optimizer"] = {"type": "Muon", "params": {"lr": 0.02, "nesterov": nesterov, "adamw_lr": 0.003}}
    config = config_from_dict(flat, world_size=1)
    model = build_decoder(config.model, source=fresh_weights(config))
    named = {p.canonical_name: p for p in model.parameters()}
    optimizer = build_optimizer(named.items(), config)
    torch.manual_seed(0)
    wanted = {name: p.detach().double() for name, p in named.items()}
    momentum = {name: torch.zeros_like(w) for name, w in wanted.items()}
    adam = {name: torch.nn.Parameter(w.clone()) for name, w in wanted.items()}
    decayed = [p for name, p in adam.items() if p.ndim == 2]
    others = [p for name, p in adam.items() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.003,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    muons = [name for name in named if ("attention." in name or "mlp." in name) and name.endswith("weight")]
    assert len(muons) == 8
    for _ in range(3):
        for name, p in named.items():
            gradient = torch.randn_like(p)
            p.grad, adam[name].grad = gradient, gradient.double()
            if name in muons:
                momentum[name] = 0.95 * momentum[name] + gradient.double()
                direction = gradient.double() + 0.95 * momentum[name] if nesterov else momentum[name]
                wanted[name] *= 1 - 0.02 * 0.1
                for rows in rows_of_matrices(name, p.shape[0], family):
                    scale = 0.2 * max(len(rows), p.shape[1]) ** 0.5
                    wanted[name][rows] -= 0.02 * scale * newton_schulz(direction[rows])
        optimizer.step()
        reference.step()
    for name, p in named.items():
        expected = wanted[name] if name in muons else adam[name].detach()
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=2e-6, msg=name)


def test_orthogonalised_singular_values_are_near_one() -> None:
    torch.manual_seed(0)
    for shape in [(32, 96), (96, 32)]:
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape), steps=5, dtype=torch.float32))
        assert values.min() > 0.6
        assert values.max() < 1.3
    assert update_scale(400, 100, "match_rms_adamw") == 0.2 * 20
    assert update_scale(400, 100, "original") == 2.0
    assert update_scale(100, 400, "original") == 1.0
