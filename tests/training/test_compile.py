"""Compiled blocks give the curve of plain ones, also where they are recomputed."""

from typing import Any

import numpy as np
import pytest
from training.layouts import ADAMW, MODEL, TRAINING, curve_of


@pytest.mark.slow
@pytest.mark.usefixtures("compilers")
@pytest.mark.parametrize("changes", [{}, {"checkpoint_activations": True}], ids=["plain", "recompute"])
def test_compiled_blocks_change_nothing(corpus: str, changes: dict[str, Any]) -> None:
    flat = MODEL | TRAINING | ADAMW | {"data_path": corpus, "train_iters": 6} | changes
    expected = curve_of(flat | {"compile": False}, 1)
    found = curve_of(flat | {"compile": True}, 1)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-5)
