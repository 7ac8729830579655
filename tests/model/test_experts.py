"""Experts against their formulas, written token by token."""

import pytest
import torch
from model_families import MIXTRAL
from torch.nn.functional import silu
from weight_sources import RandomWeights

from neox.config import config_from_dict
from neox.model.build import build_decoder, fresh_weights
from neox.model.count import count_parameters
from neox.model.experts import Experts, balanced, load_balancing_loss
from neox.model.flops import flops_per_token
from neox.model.layers import canonical_parameters

SHAPE = {
    "num_layers": 4,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "seq_length": 20,
    "padded_vocab_size": 61,
    "train_micro_batch_size_per_gpu": 1,
}
SINKHORN = MIXTRAL | {"moe_top_k": 1, "moe_router_type": "sinkhorn", "moe_aux_loss_coeff": None}


def config_of(keys, **changes):
    return config_from_dict(SHAPE | keys | changes)


def experts_of(keys, **changes):
    torch.manual_seed(0)
    return Experts(config_of(keys, **changes).model).double()


def inputs(*, seed=0):
    return torch.randn(2, 10, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_expert(module, number, x):
    up, gate = module.experts[number].linear1(x).chunk(2)
    return module.experts[number].linear2(up * silu(gate))


@pytest.mark.parametrize(
    ("changes", "normalized"),
    [({}, True), ({"moe_normalize_weights": False}, False), ({"moe_top_k": 1}, False), ({"moe_top_k": 5}, True)],
)
def test_the_most_probable_experts_are_added_up_by_weight(changes, normalized):
    module, x = experts_of(MIXTRAL, **changes), inputs()
    count = changes.get("moe_top_k", 2)
    for got, token in zip(module(x).flatten(0, 1), x.flatten(0, 1), strict=True):
        probabilities = module.router.layer(token).softmax(-1)
        chosen = probabilities.argsort(descending=True)[:count].tolist()
        total = probabilities[chosen].sum() if normalized else 1.0
        expected = sum(probabilities[e] / total * one_expert(module, e, token) for e in chosen)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-7)  # the router's arithmetic is in fp32


def test_an_expert_that_nobody_wants_has_zeros_for_gradients():
    module = experts_of(MIXTRAL)
    with torch.no_grad():
        module.router.layer.weight[3] = -100 * torch.ones(24)
    module(inputs().abs()).sum().backward()
    wanted = [expert.linear2.weight.grad.abs().max() > 0 for expert in module.experts]
    assert wanted == [True, True, True, False, True]


def test_the_loss_of_the_router_is_that_of_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = 2 * torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    for choices in (1, 2, 4):
        counts = torch.bincount(logits.topk(choices).indices.flatten(), minlength=6)
        expected = load_balancing_loss_func((logits,), 6, choices)
        torch.testing.assert_close(load_balancing_loss(logits, counts), expected)
        even = torch.full((6,), 50 * choices // 6)
        assert load_balancing_loss(torch.zeros(50, 6), even) == pytest.approx(choices, rel=0.05)


def test_the_loss_of_the_router_gives_its_gradient_times_the_scale():
    """Beside that of what comes after, and as a share of it where ranks sum their gradients."""
    gradients = {}
    for coefficient in (0.0, 0.5):
        module = experts_of(MIXTRAL, moe_aux_loss_coeff=coefficient, moe_z_loss_coeff=coefficient)
        module.loss_scale, module.tensor_ranks = 8.0, 2
        x = inputs().requires_grad_()
        module(x).square().sum().backward()
        gradients[coefficient] = (x.grad, module.router.layer.weight.grad)
    x = inputs().requires_grad_()
    logits = module.router.layer(x.flatten(0, 1))
    counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=5)
    loss = 0.5 * load_balancing_loss(logits, counts) + 0.5 * logits.exp().sum(-1).log().square().mean()
    expected = torch.autograd.grad(8.0 / 2 * loss / 4, (x, module.router.layer.weight))
    for with_loss, without, alone in zip(gradients[0.5], gradients[0.0], expected, strict=True):
        assert alone.abs().max() > 1e-3
        torch.testing.assert_close(with_loss - without, alone, rtol=0, atol=1e-6)
    module.eval()
    assert type(module(x).grad_fn).__name__ != "_WithLossBackward"


def test_noise_reaches_the_router_in_training_only():
    module, x = experts_of(MIXTRAL, moe_jitter_eps=0.5), inputs()
    seen = []
    module.router.layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0] / x.flatten(0, 1)))
    read = [[] for _ in module.experts]
    for rows, expert in zip(read, module.experts, strict=True):
        expert.register_forward_pre_hook(lambda _, arguments, rows=rows: rows.append(arguments[0]))
    module(x)
    assert 0.5 <= seen[0].min() < 0.55
    assert 1.45 < seen[0].max() <= 1.5
    tokens = {tuple(token) for token in x.flatten(0, 1).tolist()}
    assert all(tuple(row) in tokens for rows in read for row in rows[0].tolist())
    module.eval()(x)
    assert torch.equal(seen[1], torch.ones_like(seen[1]))


def plan(logits):
    """Rows and columns scaled in turn until nothing moves, as in Sinkhorn & Knopp 1967."""
    matrix = logits.exp()
    for _ in range(1000):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(0, keepdim=True)
    return matrix


def test_sinkhorn_follows_a_balanced_plan_in_training_and_the_logit_afterwards():
    module, x = experts_of(SINKHORN), inputs()
    with torch.no_grad():
        module.router.layer.weight[2] += 0.3 * x.flatten(0, 1).mean(0) / x.flatten(0, 1).mean(0).square().sum()
    tokens = x.flatten(0, 1)
    logits = module.router.layer(tokens).float()
    chosen = plan(logits.double()).argmax(1)
    assert not torch.equal(chosen, logits.argmax(1)), "else this test does not tell the two apart"
    for training, experts in ((True, chosen), (False, logits.argmax(1))):
        module.train(training)
        for got, token, expert in zip(module(x).flatten(0, 1), tokens, experts.tolist(), strict=True):
            weight = module.router.layer(token)[expert].sigmoid()
            torch.testing.assert_close(got, weight * one_expert(module, expert, token), rtol=0, atol=1e-6)


def test_a_balanced_plan_has_equal_columns_whatever_the_logits():
    logits = 3 * torch.randn(400, 8, generator=torch.Generator().manual_seed(2)) + 300 * torch.eye(8)[0]
    shares = balanced(logits).softmax(dim=1).sum(dim=0)
    torch.testing.assert_close(shares, torch.full((8,), 50.0), rtol=1e-3, atol=0)
    counts = torch.bincount(balanced(logits).argmax(1), minlength=8)
    assert counts.max() < 2 * counts.min()


def test_every_other_block_has_experts():
    """And no expert has biases, while other MLPs keep theirs."""
    config = config_of(MIXTRAL | {"moe_expert_interval": 2, "use_bias_in_mlp": True})
    model = build_decoder(config.model, source=RandomWeights(config.model).weight)
    assert [isinstance(block.mlp, Experts) for block in model.blocks] == [True, False, True, False]
    names = set(canonical_parameters(model))
    assert {"layers.2.mlp.router.layer.weight", "layers.4.mlp.experts.4.linear2.weight"} <= names
    assert {name for name in names if ".mlp." in name and name.endswith("bias")} == {
        f"layers.{index}.mlp.linear{i}.bias" for index in (3, 5) for i in (1, 2)
    }
    assert not config_of(MIXTRAL | {"use_bias_in_mlp": True}).model.use_bias_in_mlp


def test_experts_start_as_mlps_do():
    """The second matrix of each as all that write to the residual stream; every expert by numbers of its own."""
    config = config_of(MIXTRAL, hidden_size=64, intermediate_size=3 * 128, init_method_std=0.1)
    weights = dict(build_decoder(config.model, source=fresh_weights(config)).named_parameters())
    first = [weights[f"layers.2.mlp.experts.{number}.linear1.weight"] for number in (0, 1)]
    assert first[0].std().item() == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(*first)
    last = weights["layers.2.mlp.experts.1.linear2.weight"]
    assert last.std().item() == pytest.approx(0.1 / 8**0.5, rel=0.05)
    assert weights["layers.2.mlp.router.layer.weight"].std().item() == pytest.approx(0.1, rel=0.2)


def test_parameters_and_flops_of_a_token_are_those_of_its_experts():
    dense = config_of(MIXTRAL | {"moe_num_experts": None, "moe_top_k": None}).model
    config = config_of(MIXTRAL, moe_expert_interval=2).model
    router, expert = 5 * 24, 3 * 24 * 72
    found, plain = count_parameters(config), count_parameters(dense)
    assert found.total == plain.total + 2 * (router + 4 * expert)
    assert found.active == plain.total + 2 * (router + expert)
    assert plain.active == plain.total
    extra = flops_per_token(config, causal=True).blocks - flops_per_token(dense, causal=True).blocks
    assert extra == 2 * 2 * (router + expert)
