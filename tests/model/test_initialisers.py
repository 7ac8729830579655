"""The nine initialisers: spread, shape of the distribution, orthogonality, and one drawing for every layout."""

import math

import numpy as np
import pytest
import torch
from ranks import run_ranks

from neox.config import config_from_dict
from neox.model.build import build_decoder, fresh_weights
from neox.model.init import initial_tensor
from neox.model.layers import Decoder
from neox.parallel.mesh import build_mesh

DEPTH, WIDTH = 8, 128
SHAPE = {
    "num_layers": DEPTH,
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "seq_length": 16,
    "padded_vocab_size": 512,
    "init_method_std": 0.05,
    "train_micro_batch_size_per_gpu": 1,
}
# Variances, for a matrix of 512 rows and 128 columns.
VARIANCES = {
    "normal": 0.05**2,
    "scaled_normal": 0.05**2 / (2 * DEPTH),
    "single_residual_scaled_normal": 0.05**2 / DEPTH,
    "small_init": 2 / (5 * WIDTH),
    "wang_init": 4 / (DEPTH**2 * WIDTH),
    "xavier_normal": 2 / (512 + 128),
    "xavier_uniform": 2 / (512 + 128),
    "orthogonal": 2 / 512,
    "scaled_orthogonal": 2 / DEPTH / 512,
}
UP, DOWN = "layers.2.mlp.linear1.weight", "layers.2.mlp.linear2.weight"


def drawn(method, name=UP, shape=(512, 128), **changes):
    config = config_from_dict(SHAPE | {"init_method": method} | changes).model
    return initial_tensor(name, shape, config=config, seed=7).double()


@pytest.mark.parametrize("method", VARIANCES)
def test_spread(method):
    matrix = drawn(method)
    deviation = math.sqrt(VARIANCES[method])
    assert matrix.mean().abs() < 4 * deviation / math.sqrt(matrix.numel())
    # 65,536 numbers: the deviation is known to 0.3%.
    assert matrix.std() == pytest.approx(deviation, rel=0.012)
    kurtosis = ((matrix / deviation) ** 4).mean()
    assert kurtosis == pytest.approx(1.8 if method == "xavier_uniform" else 3.0, rel=0.04)
    if method == "xavier_uniform":
        bound = math.sqrt(6 / (512 + 128))
        assert 0.999 * bound < matrix.abs().max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("shape", [(512, 128), (128, 512), (128, 128)])
@pytest.mark.parametrize(("method", "gain"), [("orthogonal", 2.0), ("scaled_orthogonal", 2.0 / DEPTH)])
def test_orthogonality(method, gain, shape):
    matrix = drawn(method, shape=shape)
    small = matrix.T @ matrix if shape[0] > shape[1] else matrix @ matrix.T
    # Made in fp32 of 128 reflections, each of which rounds.
    bound = gain * 128 * 2**-24
    torch.testing.assert_close(small, gain * torch.eye(128, dtype=torch.float64), rtol=0, atol=bound)


def test_each_matrix_follows_its_key():
    changes = {"init_method": "xavier_uniform", "output_layer_init_method": "single_residual_scaled_normal"}
    config = config_from_dict(SHAPE | changes | {"norm": "rmsnorm", "embedding_norm": True}).model
    for name, parameter in Decoder(config).named_parameters():
        value = initial_tensor(name, parameter.shape, config=config, seed=7)
        if name.endswith(".bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        elif name.endswith(("attention.dense.weight", "mlp.linear2.weight")):
            assert value.std() == pytest.approx(0.05 / math.sqrt(DEPTH), rel=0.03)
        else:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.99 * bound < value.abs().max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"])
def test_norms_start_neutral(norm):
    config = config_from_dict(SHAPE | {"num_layers": 1, "norm": norm}).model
    for name, parameter in Decoder(config).named_parameters():
        if "norm" in name:
            value = initial_tensor(name, parameter.shape, config=config, seed=7)
            assert torch.equal(value, torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0))


FAMILY = {
    "num_layers": 1,
    "hidden_size": 32,
    "padded_vocab_size": 64,
    "num_kv_heads": 2,
    "activation": "swiglu",
    "mlp_multiple_of": 2,
}
FAMILY |= {"no_weight_tying": True, "model_parallel_size": 2}


def figures_of_shares(flat):
    """By method and name, of this rank's share: sum, sum of squares, number of elements."""
    torch.set_num_threads(1)
    found = {}
    mesh = build_mesh(config_from_dict(flat, world_size=2))
    for method in VARIANCES:
        config = config_from_dict(flat | {"init_method": method, "output_layer_init_method": method}, world_size=2)
        model = build_decoder(config.model, source=fresh_weights(config), mesh=mesh)
        found |= {(method, name): figures(parameter) for name, parameter in model.named_parameters()}
    return found


def figures(tensor):
    value = tensor.detach().double()
    return np.array([value.sum().item(), value.square().sum().item(), value.numel()])


def test_tensor_ranks_hold_shares_of_one_drawing():
    flat = SHAPE | FAMILY
    first, second = run_ranks(figures_of_shares, 2, flat)
    divided = 0
    for (method, name), found in first.items():
        keys = {"init_method": method, "output_layer_init_method": method, "model_parallel_size": 1}
        config = config_from_dict(flat | keys)
        shape = Decoder(config.model).get_parameter(name).shape
        whole = figures(initial_tensor(name, shape, config=config.model, seed=config.training.seed))
        replicated = found[2] == whole[2]
        divided += not replicated
        together = (found + second[method, name]) / (2 if replicated else 1)
        np.testing.assert_allclose(together, whole, rtol=1e-9, atol=1e-9, err_msg=f"{method} {name}")
    assert divided == len(VARIANCES) * 8  # six matrices, and the biases of query_key_value and linear1
