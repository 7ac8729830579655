"""Under sequence parallelism, norms, embeddings and biases of every family get the gradients of one process."""

import numpy as np
import pytest
import torch
from ranks import run_ranks

from neox.config import config_from_dict
from neox.model.build import build_decoder, fresh_weights
from neox.model.loss import Targets
from neox.parallel.mesh import build_mesh

SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "padded_vocab_size": 67,
    "train_micro_batch_size_per_gpu": 1,
}
FAMILIES = {
    "bloom": {"embedding_norm": True, "pos_emb": "none"},
    "opt": {"opt_pos_emb_offset": 2, "activation": "relu", "embedding_norm": True, "norm": "scalenorm"},
    "llama": {"norm": "rmsnorm", "activation": "swiglu", "mlp_multiple_of": 8, "no_weight_tying": True},
    "gpt_j": {"gpt_j_residual": True, "gpt_j_tied": True, "pos_emb": "rotary", "rotary_pct": 0.5},
    "olmo": {"norm": "non_parametric_layernorm", "use_bias_in_mlp": False, "pos_emb": "sinusoidal"},
    "palm": {"gpt_j_residual": True, "use_bias_in_mlp": False, "activation": "geglu", "mlp_multiple_of": 2},
}


def gradients(flat, world_size, *, sequence_parallel=False):
    """By family: the loss, and every gradient that is whole on this rank, in float64 up to the fp32 softmax."""
    torch.set_num_threads(1)
    mesh = build_mesh(config_from_dict(flat | {"model_parallel_size": world_size}, world_size=world_size))
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 67, (2, 17), generator=generator)
    targets = Targets(tokens[:, 1:], torch.full((2, 16), 1 / 32))
    found = {}
    for family, keys in FAMILIES.items():
        config = config_from_dict(flat | keys)
        model = build_decoder(
            config.model,
            source=fresh_weights(config),
            mesh=mesh,
            sequence_parallel=sequence_parallel,
            dtype=torch.float64,
        )
        loss = model(tokens[:, :-1], targets)
        loss.backward()
        found[family] = (loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()})
    return found


def on_two_ranks(flat):
    return gradients(flat, 2, sequence_parallel=True)


@pytest.fixture(scope="module")
def one():
    return run_ranks(gradients, 1, SHAPE, 1)[0]


@pytest.fixture(scope="module")
def two():
    return run_ranks(on_two_ranks, 2, SHAPE)


@pytest.mark.parametrize("family", FAMILIES)
def test_replicated_parameters_get_whole_gradients(one, two, family):
    loss, expected = one[family]
    for found_loss, found in (rank[family] for rank in two):
        # The sum of 32 losses in fp32: every addition rounds by at most half a unit of the last place.
        assert found_loss == pytest.approx(loss, rel=32 * 2**-24)
        assert found.keys() == expected.keys()
        whole = [name for name, gradient in found.items() if gradient.shape == expected[name].shape]
        assert {name for name in found if "norm" in name or "position" in name} <= set(whole)
        for name in whole:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=2e-6, err_msg=name)
