"""After which iterations a checkpoint is saved."""

from typing import Any

import pytest
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import config_from_dict
from neox.training.saving import is_save_point


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"checkpoint_factor": 7}, [7, 14, 21, 28]),
        ({"checkpoint_factor": 10, "extra_save_iters": [0, 3, 20]}, [0, 3, 10, 20, 30]),
        ({"extra_save_iters": [5]}, [5]),
        ({"checkpoint_factor": 2, "checkpoint_scale": "log"}, [1, 2, 4, 8, 16]),
        ({"checkpoint_factor": 1.5, "checkpoint_scale": "log"}, [1, 2, 3, 5, 7, 11, 17, 25]),
        ({"checkpoint_factor": 1.1, "checkpoint_scale": "log", "extra_save_iters": [13]}, None),
        ({"checkpoint_factor": 3, "save": None}, []),
    ],
)
def test_save_points(changes: dict[str, Any], expected: list[int] | None) -> None:
    flat = MODEL | TRAINING | ADAMW | {"data_path": "x", "save": "checkpoints"} | changes
    config = config_from_dict(flat, world_size=1)
    if expected is None:  # GPT-NeoX's own list: each whole part of a power of the factor
        expected = sorted({13, *(int(1.1**power) for power in range(40))})
    assert [iteration for iteration in range(31) if is_save_point(config, iteration)] == [
        iteration for iteration in expected if iteration <= 30
    ]
