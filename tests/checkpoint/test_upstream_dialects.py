"""Names and orders of rows that GPT-NeoX has used over the years."""

from dataclasses import replace

import pytest
import torch
from checkpoint.upstream_folders import largest_difference, one_golden, tp2_golden, write_pipeline, write_sequential
from golden_models import canonical

from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.upstream.reader import Hints, UpstreamReader
from neox.errors import CheckpointError

INTERLEAVED, CONTIGUOUS = Hints(gqa_layout="interleaved"), Hints(gqa_layout="contiguous")

LEGACY = {"linear1": "dense_h_to_4h", "linear2": "dense_4h_to_h"}
QKV = "sequential.2.attention.query_key_value.weight"


def renamed(weights, names):
    found = {}
    for name, tensor in weights.items():
        new = name
        for ours, theirs in names.items():
            new = new.replace(ours, theirs)
        found[new] = tensor
    return found


def separate_gates(weights):
    """Each rank's linear1, [up; gate], as the two matrices that it was made of."""
    found = {}
    for name, tensor in weights.items():
        if "mlp.linear1" in name:
            up, gate = tensor.chunk(2)
            found |= {name.replace("linear1", "w1"): gate.clone(), name.replace("linear1", "w3"): up.clone()}
        else:
            found[name.replace("mlp.linear2", "mlp.w2")] = tensor
    return found


@pytest.mark.parametrize("write", [write_sequential, write_pipeline])
def test_gates_and_projections_apart(tmp_path, write):
    config, arrays, by_rank = tp2_golden("llama_mha")
    write(tmp_path / "global_step1", [separate_gates(weights) for weights in by_rank], config)
    reader = open_checkpoint(tmp_path / "global_step1")
    assert set(reader.names()) == {canonical(name) for name in by_rank[0]}
    assert largest_difference(reader, config, arrays) <= 2e-6


def test_a_gate_without_its_projection_is_refused(tmp_path):
    config, _, by_rank = tp2_golden("llama_mha")
    weights = separate_gates(by_rank[0])
    weights.pop("sequential.3.mlp.w3.weight")
    write_pipeline(tmp_path / "global_step1", [weights], config)
    with pytest.raises(CheckpointError, match=r"layer 3 holds mlp\.w1\.weight and no mlp\.w3\.weight"):
        open_checkpoint(tmp_path / "global_step1")


TRANSFORMER_ENGINE = {
    "mlp.linear1.": "mlp.fc1_",
    "mlp.linear2.": "mlp.fc2_",
    "post_attention_layernorm.scale": "mlp.layer_norm_weight",
    "post_attention_layernorm.": "mlp.layer_norm_",
    "attention.query_key_value.": "attention.qkv.",
    "attention.dense.": "attention.proj.",
}


def test_names_of_transformer_engine(tmp_path):
    config, arrays, weights = one_golden("pythia_like")
    named = renamed(weights, TRANSFORMER_ENGINE) | {"sequential.2.attention.qkv._extra_state": torch.zeros(4)}
    write_sequential(tmp_path / "global_step1", [named])
    reader = open_checkpoint(tmp_path / "global_step1")
    assert set(reader.names()) == {canonical(name) for name in weights}
    assert largest_difference(reader, config, arrays) <= 2e-6


def test_transformer_engine_adds_one_bias_after_the_reduction(tmp_path):
    _, _, by_rank = tp2_golden("pythia_like")
    write_sequential(tmp_path / "global_step1", [renamed(weights, TRANSFORMER_ENGINE) for weights in by_rank])
    reader = UpstreamReader(tmp_path / "global_step1", hints=Hints(gpt_j_residual=True))
    parts = [weights["sequential.2.attention.dense.bias"] for weights in by_rank]
    assert torch.allclose(reader.tensor("layers.2.attention.dense.bias"), (parts[0] + parts[1]) / 2)


@pytest.mark.parametrize(("name", "what"), [("llama_mha", "with a gate"), ("llama_gqa", "of heads that share keys")])
def test_orders_of_transformer_engine_that_are_not_known_are_refused(tmp_path, name, what):
    config, _, by_rank = tp2_golden(name)
    write_sequential(tmp_path / "global_step1", [renamed(w, TRANSFORMER_ENGINE) for w in by_rank], config)
    with pytest.raises(CheckpointError, match=f"TransformerEngine's,? {what}"):
        open_checkpoint(tmp_path / "global_step1")


def projected_by_query_head(x_SD, weight, *, heads, kv_heads):
    """What a tensor rank made of an input in 2024: each query head had its query and a share of the keys and values."""
    size, share = 8, 8 * kv_heads // heads
    rows_SNR = (x_SD @ weight.T).reshape(len(x_SD), heads, size + 2 * share)
    q, k, v = rows_SNR[..., :size], rows_SNR[..., size : size + share], rows_SNR[..., size + share :]
    return q, k.reshape(len(x_SD), kv_heads, size), v.reshape(len(x_SD), kv_heads, size)


@pytest.mark.parametrize("ranks", [1, 2])
def test_shared_keys_spread_over_query_heads(tmp_path, ranks):
    config, _, by_rank = tp2_golden("llama_gqa")
    heads, kv_heads = config.model.num_attention_heads, config.model.num_kv_heads
    assert (heads, kv_heads, config.model.hidden_size) == (4, 2, 32)
    by_rank = by_rank[:ranks] if ranks == 2 else [merged(by_rank)]
    generator = torch.Generator().manual_seed(1)
    for weights in by_rank:
        weights[QKV] = torch.randn(weights[QKV].shape, generator=generator)
    x_SD = torch.randn(5, 32, generator=generator)
    parts = [
        projected_by_query_head(x_SD, weights[QKV], heads=heads // ranks, kv_heads=kv_heads // ranks)
        for weights in by_rank
    ]
    expected = torch.cat([torch.cat(part, dim=1).flatten(1) for part in zip(*parts, strict=True)], dim=1)

    write_sequential(tmp_path / "old", [separate_gates(weights) for weights in by_rank], config)
    write_sequential(tmp_path / "new", by_rank, config)
    for reader in (
        UpstreamReader(tmp_path / "old"),
        UpstreamReader(tmp_path / "new", hints=INTERLEAVED),
    ):
        whole = reader.tensor(canonical(QKV))
        assert reader.shapes()[canonical(QKV)] == whole.shape
        assert torch.allclose(x_SD @ whole.T, expected, atol=1e-6)
    for reader in (
        UpstreamReader(tmp_path / "new"),
        UpstreamReader(tmp_path / "old", hints=CONTIGUOUS),
    ):
        whole = reader.tensor(canonical(QKV))
        assert not torch.allclose(x_SD @ whole.T, expected, atol=1e-2)


def merged(by_rank):
    """A model of one rank, of the right shapes."""
    return {
        name: torch.cat(
            [weights[name] for weights in by_rank], dim=0 if "dense" not in name and "linear2" not in name else 1
        )
        if tensor.dim() == 2
        else tensor
        for name, tensor in by_rank[0].items()
    }


def test_the_number_of_heads_must_be_known_where_rows_go_from_head_to_head(tmp_path):
    _, _, by_rank = tp2_golden("llama_gqa")
    write_sequential(tmp_path / "a", by_rank)
    with pytest.raises(CheckpointError, match="nothing says how many heads"):
        UpstreamReader(tmp_path / "a", hints=INTERLEAVED).tensor(canonical(QKV))
    write_sequential(tmp_path / "b", by_rank, args={"num_attention_heads": 4})
    assert UpstreamReader(tmp_path / "b", hints=INTERLEAVED).tensor(canonical(QKV)).shape == (
        64,
        32,
    )


def test_a_file_beside_the_weights_says_how_rows_go(tmp_path):
    config, _, by_rank = tp2_golden("llama_gqa")
    write_sequential(tmp_path / "a", by_rank, config)
    told = UpstreamReader(tmp_path / "a", hints=INTERLEAVED).tensor(canonical(QKV))
    assert not torch.equal(UpstreamReader(tmp_path / "a").tensor(canonical(QKV)), told)
    hint = tmp_path / "a" / "configs" / "rows.yml"
    hint.write_text("gqa-layout: interleaved")
    assert torch.equal(open_checkpoint(tmp_path / "a").tensor(canonical(QKV)), told)
    hint.write_text("gqa-layout: by head")
    with pytest.raises(CheckpointError, match="gqa_layout is by head; expected contiguous or interleaved"):
        open_checkpoint(tmp_path / "a").tensor(canonical(QKV))


def test_a_reward_head_is_whole(tmp_path):
    _, _, by_rank = tp2_golden("pythia_like")
    for rank, weights in enumerate(by_rank):
        weights["sequential.6.rm_linear.weight"] = torch.full((1, 16), float(rank))
    write_pipeline(tmp_path / "global_step1", by_rank)
    reader = open_checkpoint(tmp_path / "global_step1")
    assert reader.shapes()["layers.6.rm_linear.weight"] == (1, 32)
    assert reader.tensor("layers.6.rm_linear.weight").flatten().tolist() == [0.0] * 16 + [1.0] * 16


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("sequential.2.attention.rpe.weight", r"layer 2 holds attention\.rpe\.weight"),
        ("sequential.2.mixer.in_proj.weight", r"layer 2 holds mixer\.in_proj\.weight"),
        ("sequential.2.mlp.router.layer.weight", r"layer 2 holds mlp\.router\.layer\.weight; .* only Hugging"),
    ],
)
def test_what_is_no_part_of_the_decoder_is_refused_by_name(tmp_path, name, told):
    _, _, weights = one_golden()
    write_sequential(tmp_path / "global_step1", [weights | {name: torch.zeros(4, 32)}])
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(tmp_path / "global_step1")


def test_ranks_of_different_models_are_refused(tmp_path):
    config, _, by_rank = tp2_golden("pythia_like")
    by_rank[1].pop("sequential.3.mlp.linear1.bias")
    write_sequential(tmp_path / "global_step1", by_rank, config)
    with pytest.raises(CheckpointError, match=r"tensor rank 1 has layers\.3\.mlp\.linear1\.bias of shape None"):
        open_checkpoint(tmp_path / "global_step1")


def test_the_configuration_given_tells_the_number_of_heads(tmp_path):
    config, _, by_rank = tp2_golden("llama_gqa")
    write_sequential(tmp_path / "told", by_rank, args={"num_attention_heads": 4})
    write_sequential(tmp_path / "given", by_rank)
    hints = replace(Hints.of(config.model), gqa_layout="interleaved")
    given = UpstreamReader(tmp_path / "given", hints=hints).tensor(canonical(QKV))
    assert torch.equal(given, UpstreamReader(tmp_path / "told", hints=INTERLEAVED).tensor(canonical(QKV)))
