"""The same seed gives the same initial weights at every layout."""

from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import config_from_dict
from neox.model.build import build_decoder, fresh_weights
from neox.model.init import initial_tensor, standard_deviation

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"model_parallel_size": 2}),
    "tp4": (4, {"model_parallel_size": 4}),
    "pp2": (2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
    "zero3": (2, {"zero_optimization": {"stage": 3}}),
    "pp2_tp2": (4, {"pipe_parallel_size": 2, "model_parallel_size": 2, "gradient_accumulation_steps": 2}),
}


def initial_weights(flat: dict[str, Any], world_size: int) -> dict[str, np.ndarray]:
    from neox.parallel.mesh import build_mesh
    from neox.training.run import build_engine
    from neox.training.state import owned_tensors

    config = config_from_dict(flat, world_size=world_size)
    engine = build_engine(config, build_mesh(config), fresh_weights(config))
    return {t.key: t.value.numpy() for t in owned_tensors(engine, with_optimizer=False)}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_do_not_depend_on_the_layout(layout: str, tied: bool) -> None:
    world_size, changes = LAYOUTS[layout]
    flat = MODEL | TRAINING | ADAMW | {"no_weight_tying": not tied}
    expected = build_decoder(config_from_dict(flat).model, source=fresh_weights(config_from_dict(flat)))
    found: dict[str, np.ndarray] = {}
    for of_rank in run_ranks(initial_weights, world_size, flat | changes, world_size):
        found |= of_rank
    names = {name for name, _ in expected.named_parameters()}
    assert found.keys() == names
    for name, parameter in expected.named_parameters():
        np.testing.assert_array_equal(found[name], parameter.detach().numpy(), err_msg=name)


def test_another_seed_gives_other_weights() -> None:
    config = config_from_dict(MODEL)
    name, shape = "layers.2.mlp.linear1.weight", (256, 64)
    one = initial_tensor(name, shape, config=config.model, seed=1)
    assert not torch.equal(one, initial_tensor(name, shape, config=config.model, seed=2))
    assert not torch.equal(one, initial_tensor("layers.3.mlp.linear1.weight", shape, config=config.model, seed=1))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("normal", 0.02),
        ("scaled_normal", 0.02 / (2 * 2) ** 0.5),
        ("small_init", (2 / (5 * 64)) ** 0.5),
        ("wang_init", 2 / (2 * 64**0.5)),
    ],
)
def test_spread_of_the_initialisers(method: str, expected: float) -> None:
    config = config_from_dict(MODEL | {"init_method": method, "output_layer_init_method": "normal"}).model
    assert standard_deviation(method, config) == pytest.approx(expected)
    drawn = initial_tensor("layers.2.mlp.linear1.weight", (256, 64), config=config, seed=1)
    assert float(drawn.std()) == pytest.approx(expected, rel=0.02)
    output = initial_tensor("layers.2.mlp.linear2.weight", (64, 256), config=config, seed=1)
    assert float(output.std()) == pytest.approx(0.02, rel=0.02)
    assert initial_tensor("layers.2.mlp.linear2.bias", (64,), config=config, seed=1).abs().max() == 0
    assert (initial_tensor("layers.2.input_layernorm.weight", (64,), config=config, seed=1) == 1).all()
