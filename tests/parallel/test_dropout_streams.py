"""Dropout under tensor parallelism: equal masks where activations are replicated, independent ones where divided."""

from typing import Any

import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING

from neox.config import config_from_dict
from neox.model.build import build_decoder, fresh_weights
from neox.parallel.mesh import build_mesh
from neox.parallel.rng import divided_stream, rng_state, seed_dropout

DROPOUT = {"hidden_dropout": 0.3, "attention_dropout": 0.3}


def hidden_states(flat: dict[str, Any], world_size: int) -> tuple[list[Any], bool]:
    """The output of every block on this rank, and whether the stream ended where that of the other ranks did."""
    config = config_from_dict(flat, world_size=world_size)
    mesh = build_mesh(config)
    sequence_parallel = config.parallel.sequence_parallel
    model = build_decoder(
        config.model, source=fresh_weights(config), mesh=mesh, sequence_parallel=sequence_parallel
    ).train()
    seed_dropout(1, mesh)
    outputs: list[Any] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output.detach().numpy()))
    model.hidden(torch.arange(64).view(2, 32) % 131)
    states = [torch.empty_like(rng_state(mesh.device)) for _ in range(world_size)]
    torch.distributed.all_gather(states, rng_state(mesh.device))
    return outputs, all(torch.equal(state, states[0]) for state in states)


def test_replicated_activations_get_equal_masks() -> None:
    flat = MODEL | TRAINING | ADAMW | DROPOUT | {"model_parallel_size": 2}
    (first, same), (second, _) = run_ranks(hidden_states, 2, flat, 2)
    assert same
    for one, other in zip(first, second, strict=True):
        assert (one == other).all()
    (quiet, _), _ = run_ranks(hidden_states, 2, flat | {"hidden_dropout": 0.0, "attention_dropout": 0.0}, 2)
    assert not (quiet[0] == first[0]).all()


def test_divided_sequence_keeps_the_streams_together() -> None:
    flat = MODEL | TRAINING | ADAMW | DROPOUT | {"model_parallel_size": 2, "sequence_parallel": True}
    (first, same), (second, _) = run_ranks(hidden_states, 2, flat, 2)
    assert same
    assert first[0].shape == second[0].shape == (2, 16, 64)


def draws() -> tuple[list[float], list[float], list[float]]:
    config = config_from_dict(MODEL | TRAINING | ADAMW | {"model_parallel_size": 2}, world_size=4)
    mesh = build_mesh(config)
    seed_dropout(1, mesh)
    before = torch.rand(4).tolist()
    with divided_stream(mesh):
        inside = torch.rand(4).tolist()
    return before, inside, torch.rand(4).tolist()


def test_streams_of_a_grid() -> None:
    """Ranks 0 and 1 share a tensor group, 2 and 3 the other; the groups are data-parallel."""
    first, second, third, _ = run_ranks(draws, 4)
    assert first[0] == second[0]
    assert first[0] != third[0]
    assert first[1] != second[1]
    assert first[2] == second[2]
    assert first[2] != first[0]


def test_recomputed_blocks_repeat_their_masks() -> None:
    config = config_from_dict(MODEL | TRAINING | ADAMW | DROPOUT)
    gradients = []
    for recompute in (0, 1):
        model = build_decoder(config.model, source=fresh_weights(config)).train()
        model.recompute_every = recompute
        torch.manual_seed(3)
        model.hidden(torch.arange(64).view(2, 32) % 131).square().sum().backward()
        gradients.append(model.embedding.word_embeddings.weight.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0
