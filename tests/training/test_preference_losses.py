"""The formulas of the objectives against plain sums in double precision."""

import math

import pytest
import torch

from neox.config.preference import PreferenceConfig
from neox.data.online import leave_one_out
from neox.model.attention import PLAIN
from neox.model.loss import Targets
from neox.parallel.mesh import Mesh
from neox.training.batches import MicroBatch, ModelInputs, global_batch
from neox.training.objectives.dpo import dpo_loss
from neox.training.objectives.kto import KahnemanTversky, kto_loss
from neox.training.objectives.objective import mean_figures
from neox.training.objectives.reinforce import Reinforce, divergence, full_divergence, reinforce_loss
from neox.training.objectives.reward import last_scored, reward_loss
from neox.training.objectives.scores import Reference


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@pytest.fixture
def numbers() -> tuple[list[float], list[float]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, generator=generator).mul(4).tolist(), torch.randn(6, generator=generator).mul(4).tolist()


def test_dpo(numbers: tuple[list[float], list[float]]) -> None:
    pos, neg = numbers
    wanted = sum(-math.log(sigmoid(0.3 * (p - n))) for p, n in zip(pos, neg, strict=True)) / 6
    assert float(dpo_loss(torch.tensor(pos), torch.tensor(neg), beta=0.3)) == pytest.approx(wanted, rel=1e-6)


def test_dpo_is_finite_where_the_model_is_surely_wrong() -> None:
    pos = torch.tensor([-1e4], requires_grad=True)
    loss = dpo_loss(pos, torch.tensor([1e4]), beta=0.1)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2e3)
    assert float(pos.grad) == pytest.approx(-0.1)  # type: ignore[arg-type]


def test_rewards(numbers: tuple[list[float], list[float]]) -> None:
    pos, neg = numbers
    pairs = list(zip(pos, neg, strict=True))
    wanted = sum(-math.log(sigmoid(p - n)) + 0.02 * (p * p + n * n) for p, n in pairs) / 6
    assert float(reward_loss(torch.tensor(pos), torch.tensor(neg), z_loss=0.02)) == pytest.approx(wanted, rel=1e-6)


def test_the_reward_is_the_last_labelled_tokens() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]])
    inputs = ModelInputs(torch.zeros(3, 4), Targets(torch.zeros(3, 4), weights), PLAIN)
    assert last_scored(torch.arange(12.0).view(3, 4), inputs).tolist() == [1.0, 6.0, 8.0]


def test_kto(numbers: tuple[list[float], list[float]]) -> None:
    ratios, _ = numbers
    rewards = [1.0, -1.0, 1.0, -1.0, 0.0, 0.5]
    settings = {"beta": 0.2, "desirable": 1.3, "undesirable": 0.7}
    found = kto_loss(torch.tensor(ratios), torch.tensor(rewards), **settings)
    origins = [sum(max(0.0, r) for r in ratios[3:]) / 3] * 3 + [sum(max(0.0, r) for r in ratios[:3]) / 3] * 3
    weights = [1.3, 0.7, 1.3, 0.7, 0.0, 1.3]
    rows = zip(ratios, rewards, origins, weights, strict=True)
    wanted = sum(w * (1.0 - sigmoid(0.2 * r * (x - z))) for x, r, z, w in rows) / 6
    assert float(found) == pytest.approx(wanted, rel=1e-6)


def test_ktos_reference_point_has_no_gradient() -> None:
    ratios = torch.tensor([2.0, 1.0], requires_grad=True)
    kto_loss(ratios, torch.tensor([1.0, 0.0]), beta=1.0, desirable=1.0, undesirable=1.0).backward()
    slope = sigmoid(1.0) * (1.0 - sigmoid(1.0)) / 2
    assert ratios.grad is not None
    assert ratios.grad.tolist() == pytest.approx([-slope, 0.0])


def test_figures_of_a_token_are_means_over_the_tokens_of_the_step() -> None:
    masks = torch.tensor([[[1, 0, 0], [0, 0, 0]], [[1, 1, 1], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]]]).float()
    tokens = torch.arange(18).view(3, 2, 3)
    batch = global_batch([MicroBatch(t, t, m) for t, m in zip(tokens, masks, strict=True)], Mesh())
    extras = {"rewards": torch.ones(2), "raw_rewards": torch.ones(2)}
    reference = Reference(lambda tokens, labels, context: -0.5 * tokens)  # type: ignore[arg-type]
    found = {}
    for kind in (KahnemanTversky, Reinforce):
        objective = kind(PreferenceConfig(kl_impl="abs"), torch.float32, reference, {})
        rows = [row._replace(extras=extras) for row in batch.micro_batches]
        steps = [objective(lambda tokens, labels, context: -1.0 * tokens, row)[1] for row in rows]
        found |= {f"{kind.__name__} {name}": float(value) for name, value in mean_figures(steps, Mesh()).items()}
    mean = float(tokens[masks > 0].float().mean())
    wanted = {"KahnemanTversky kl": -mean / 2, "Reinforce kl": mean / 2, "Reinforce logp": -mean}
    wanted["Reinforce ref_logp"] = -mean / 2
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


def test_which_penalties_have_a_gradient() -> None:
    logits = torch.tensor([0.3, -1.0, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    policy = torch.log_softmax(logits, dim=-1)
    gap = policy - reference
    wanted = {
        "mse": (policy.exp() * gap).sum(),
        "abs": (policy.exp() - reference.exp()).abs().sum(),
        "kl": 0.0 * gap[0],
    }
    for kind, penalty in wanted.items():
        sampled = (policy.exp().detach() * divergence(policy, reference, kind=kind)).sum()  # in expectation
        slopes = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (sampled, penalty)]
        torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


def test_divergences() -> None:
    policy, reference = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -1.5]])
    assert divergence(policy, reference, kind="abs").tolist() == [[1.0, 1.5]]
    assert divergence(policy, reference, kind="mse").tolist() == [[0.5, 1.125]]
    assert divergence(policy, reference, kind="kl").tolist() == [[1.0, -1.5]]


def test_the_full_divergence_is_torchs() -> None:
    logits = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    policy, reference = torch.log_softmax(logits, dim=-1)
    found = full_divergence(policy, reference)
    distribution = torch.distributions.Categorical
    wanted = torch.distributions.kl_divergence(distribution(logits=policy), distribution(logits=reference))
    torch.testing.assert_close(found, wanted)


def test_the_divergence_of_samples_is_the_full_one_on_average() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    policy, reference = torch.log_softmax(logits, dim=-1)
    on_average = (policy.exp() * divergence(policy, reference, kind="kl")).sum()
    torch.testing.assert_close(on_average, full_divergence(policy, reference))


def test_reinforce() -> None:
    policy = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])
    advantages = torch.tensor([0.5, -2.0])
    assert reinforce_loss(policy, advantages, None, beta=9.0).tolist() == [[0.5, 1.0], [-6.0, -8.0]]
    penalised = reinforce_loss(policy, advantages, torch.ones(2, 2), beta=0.25)
    assert penalised.tolist() == [[0.75, 1.25], [-5.75, -7.75]]


def test_leave_one_out() -> None:
    rewards = [1.0, 4.0, -2.0]
    wanted = [r - sum(o for j, o in enumerate(rewards) if j != i) / 2 for i, r in enumerate(rewards)]
    assert leave_one_out(rewards) == pytest.approx(wanted)
    assert sum(leave_one_out([0.3, 0.9, 0.1, 0.4])) == pytest.approx(0.0)
