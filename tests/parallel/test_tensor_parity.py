"""Two tensor ranks compute what one process does: logits and every gradient, with the sequence divided and without."""

from typing import Any

import numpy as np
import pytest
import torch
from golden_models import GOLDENS, canonical, read_golden
from ranks import run_ranks
from weight_sources import RandomWeights

from neox.config import Config, config_from_dict
from neox.errors import ConfigError
from neox.model.attention import AttentionContext
from neox.model.build import SINGLE, build_decoder
from neox.model.layers import Decoder
from neox.parallel.mesh import Mesh, build_mesh
from neox.parallel.splits import join_shards, row_groups, split_dimension

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 36,
    "num_attention_heads": 6,
    "seq_length": 16,
    "padded_vocab_size": 31,
    "pos_emb": "rotary",
    "train_micro_batch_size_per_gpu": 1,
}
GQA = {"num_kv_heads": 2}
LLAMA = GQA | {"norm": "rmsnorm", "activation": "swiglu", "use_bias_in_attn_linear": False, "use_bias_in_mlp": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa_gated_biases": GQA | {"activation": "geglu", "intermediate_size": 90},
    "llama": LLAMA | {"rope_scaling": YARN, "no_weight_tying": True},
    "alibi": {"pos_emb": "alibi"},
    "alibi_gqa_window": GQA | {"pos_emb": "alibi", "sliding_window_width": 5},
    "parallel_tied_dynamic": {"gpt_j_residual": True, "gpt_j_tied": True, "rope_scaling": DYNAMIC},
    "qk_layernorm": {"use_qk_layernorm": True},
    "qk_layernorm_gqa_nonparametric": GQA | {"use_qk_layernorm": True, "norm": "non_parametric_layernorm"},
    "qk_rmsnorm_gqa": LLAMA | {"use_qk_layernorm": True},
    "qk_scalenorm": {"use_qk_layernorm": True, "norm": "scalenorm"},
    "embedding_norm_sinusoidal": {"pos_emb": "sinusoidal", "embedding_norm": True},
}
DOCUMENTS = ("mha", "llama", "alibi_gqa_window", "parallel_tied_dynamic", "qk_layernorm")
"""Variants that are run with packed documents too."""


def cases() -> list[tuple[str, bool]]:
    """Variants, without and with documents."""
    return [(name, False) for name in VARIANTS] + [(name, True) for name in DOCUMENTS]


def config_of(name: str, **changes: Any) -> Config:
    return config_from_dict(BASE | VARIANTS[name] | changes, world_size=None)


def outcome(config: Config, mesh: Mesh, *, documents: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits and gradients of a rank, in fp64 so that the order of sums does not count."""
    model = build_decoder(
        config.model,
        source=RandomWeights(config.model).weight,
        mesh=mesh,
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=torch.float64,
    )
    tokens = torch.arange(32).view(2, 16) * 7 % 31
    logits = run(model, tokens, documents=documents)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return logits.detach().numpy(), gradients


def run(model: Decoder, tokens: torch.Tensor, *, documents: bool) -> torch.Tensor:
    if not documents:
        return model(tokens)
    lengths = ([3, 9, 4], [10, 6])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    numbers = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    return model(tokens, contexts=AttentionContext(positions_BS=positions, documents_BS=numbers))


def outcomes_of_rank() -> list[Any]:
    """Every case on this rank of two, first without and then with sequence parallelism."""
    torch.set_num_threads(1)
    found, mesh = [], build_mesh(config_from_dict(BASE | {"model_parallel_size": 2}, world_size=2))
    for sequence_parallel in (False, True):
        for name, documents in cases():
            config = config_of(name, model_parallel_size=2, sequence_parallel=sequence_parallel)
            found.append(outcome(config, mesh, documents=documents))
    return found


def joined(name: str, shards: list[np.ndarray], shape: tuple[int, ...], config: Config) -> np.ndarray:
    """The whole gradient; where it is not divided, the ranks must agree on it."""
    if split_dimension(name) is None:
        assert np.allclose(shards[0], shards[1], rtol=1e-9, atol=1e-12), f"{name} differs between the ranks"
    tensors = [torch.from_numpy(shard) for shard in shards]
    return join_shards(name, tensors, shape=torch.Size(shape), groups=row_groups(name, config.model)).numpy()


def test_two_ranks_equal_one() -> None:
    first, second = run_ranks(outcomes_of_rank, 2)
    expected = {case: outcome(config_of(case[0]), SINGLE, documents=case[1]) for case in cases()}
    for i, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        case = cases()[i % len(cases())]
        logits, gradients = expected[case]
        label = f"{case}, sequence parallel {i >= len(cases())}"
        for rank in (ours, theirs):
            assert np.abs(rank[0] - logits).max() <= 1e-9 * np.abs(logits).max(), label
        assert gradients.keys() == ours[1].keys()
        for name, gradient in gradients.items():
            whole = joined(name, [ours[1][name], theirs[1][name]], gradient.shape, config_of(case[0]))
            assert np.abs(whole - gradient).max() <= 1e-9 * np.abs(gradient).max() + 1e-12, f"{label}: {name}"


GOLDEN_PAIRS = ("alibi", "gpt2_default", "llama_gqa", "llama_mha", "pythia_like", "rotary_seqres_untied")


def upstreams_pair(name: str) -> tuple[Config, list[dict[str, np.ndarray]], list[dict[str, torch.Tensor]]]:
    """Configuration, arrays and weights of both ranks that upstream ran together."""
    parts = [read_golden(GOLDENS / "tp2" / f"{name}.rank{rank}.npz") for rank in (0, 1)]
    return parts[0][0], [arrays for _, arrays, _ in parts], [weights for _, _, weights in parts]


def whole_weights(config: Config, by_rank: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Logical tensors; each rank added its own bias to a partial sum where the residual is parallel."""
    whole = {}
    for golden_name in by_rank[0]:
        name, shards = canonical(golden_name), [weights[golden_name] for weights in by_rank]
        shape = list(shards[0].shape)
        dimension = split_dimension(name)
        if dimension is not None:
            shape[dimension] *= 2
        whole[name] = join_shards(name, shards, shape=torch.Size(shape), groups=row_groups(name, config.model))
        if name.endswith(("dense.bias", "linear2.bias")) and config.model.gpt_j_residual:
            whole[name] = shards[0] + shards[1]
    return whole


def logits_of_golden_pairs() -> list[np.ndarray]:
    """What two ranks of ours compute from the weights of upstream's two."""
    torch.set_num_threads(1)
    found, mesh = [], build_mesh(config_from_dict(BASE | {"model_parallel_size": 2}, world_size=2))
    for name in GOLDEN_PAIRS:
        config, arrays, by_rank = upstreams_pair(name)
        whole = whole_weights(config, by_rank)
        # In float64, so that upstream's rounding, which is in the file, is the only one.
        model = build_decoder(
            config.model,
            source=lambda key, shape, whole=whole: whole[key].view(shape),
            mesh=mesh,
            dtype=torch.float64,
        )
        mine = by_rank[mesh.tensor_rank]
        for key, parameter in model.named_parameters():
            if split_dimension(key) is not None:
                assert torch.equal(parameter, mine[key.replace("layers", "sequential", 1)].double()), key
        found.append(model(torch.from_numpy(arrays[0]["tokens"])).detach().numpy())
    return found


def test_two_ranks_equal_upstreams_two() -> None:
    for found in run_ranks(logits_of_golden_pairs, 2):
        for name, logits in zip(GOLDEN_PAIRS, found, strict=True):
            assert np.abs(logits - upstreams_pair(name)[1][0]["logits"]).max() <= 2e-6, name


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_kv_heads: 1 is not divisible by model_parallel_size 2; change one"):
        config_from_dict(BASE | {"num_kv_heads": 1, "model_parallel_size": 2})
    with pytest.raises(ConfigError, match="num_attention_heads 6 is not divisible by 4; nearest that works: 3"):
        config_from_dict(BASE | {"num_kv_heads": 4})
