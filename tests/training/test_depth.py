"""Forty-four layers, as 20B has, over four pipeline stages and two tensor ranks."""

import numpy as np
from training.layouts import MODEL, SGD, TRAINING, curve_of


def test_44_layers_at_pp4_tp2_equal_one_process(corpus: str) -> None:
    flat = MODEL | TRAINING | SGD | {"num_layers": 44, "train_iters": 4, "data_path": corpus}
    flat |= {"init_method": "small_init", "output_layer_init_method": "wang_init", "train_batch_size": 8}
    expected = curve_of(flat, 1)
    layout = {"pipe_parallel_size": 4, "model_parallel_size": 2, "gradient_accumulation_steps": 4}
    found = curve_of(flat | layout, 8)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-5)
    assert found.weights.keys() == expected.weights.keys()
    assert len(found.weights) == 44 * 12 + 4
    for name, weight in expected.weights.items():
        np.testing.assert_allclose(found.weights[name], weight, rtol=0, atol=1e-4, err_msg=name)
