"""REINFORCE on completions that a server has sampled and rated."""

import torch

from neox.training.batches import ModelInputs
from neox.training.objectives.objective import Figures, Model
from neox.training.objectives.scores import WithReference, token_mean, token_scores


def divergence(policy_BS: torch.Tensor, reference_BS: torch.Tensor, *, kind: str) -> torch.Tensor:
    """Estimate, from the log-probabilities of the tokens alone, how far a model is from the reference; [B, S].

    The expectation of `kl` over the model's own tokens is the divergence KL(pi || pi_ref). `abs` and `mse` have less
    variance and a bias (Schulman 2020, "Approximating KL Divergence", where `mse` is k2).
    """
    difference = policy_BS - reference_BS
    return {"abs": difference.abs, "mse": lambda: 0.5 * difference.square(), "kl": lambda: difference}[kind]()


def full_divergence(policy_BSV: torch.Tensor, reference_BSV: torch.Tensor) -> torch.Tensor:
    """KL(pi || pi_ref) of each token's distribution, [B, S], from log-probabilities of the whole vocabulary."""
    return (policy_BSV.exp() * (policy_BSV - reference_BSV)).sum(-1)


def reinforce_loss(
    policy_BS: torch.Tensor, advantages_B: torch.Tensor, divergence_BS: torch.Tensor | None, *, beta: float
) -> torch.Tensor:
    """Loss of each token, [B, S], whose gradient in expectation is that of -reward + beta penalty.

    Over the model's own tokens the penalty is KL(pi || pi_ref) for the divergences `mse` and `full`, and
    sum |pi - pi_ref| for `abs`. That of `kl` has no gradient: the expectation of grad log pi is 0.

    Williams 1992, "Simple Statistical Gradient-Following Algorithms"; with the leave-one-out baseline Ahmadian et al.
    2024, "Back to Basics: Revisiting REINFORCE Style Optimization", section 3.

    Args:
        policy_BS: log-probabilities of the completions' tokens.
        advantages_B: reward less baseline of each completion.
        divergence_BS: see `divergence`; None for no penalty.
        beta: weight of the divergence.
    """
    losses_BS = -policy_BS * advantages_B[:, None]
    return losses_BS if divergence_BS is None else losses_BS + beta * divergence_BS


class Reinforce(WithReference):
    """REINFORCE with a penalty on the divergence from a reference; the mean is over the scored tokens of the step.

    Without one there is no penalty.
    """

    def __call__(self, model: Model, inputs: ModelInputs) -> tuple[torch.Tensor, Figures]:
        """See Objective."""
        raw_B = inputs.extras["raw_rewards"]
        policy_BS, reference_BS, divergence_BS = self._scores(model, inputs)
        losses_BS = reinforce_loss(
            policy_BS, inputs.extras["rewards"], divergence_BS, beta=self.settings.kl_div_beta
        ).float()
        figures = {
            "logp": token_mean(policy_BS, inputs),
            "reward": raw_B.mean(),
            "reward_std": raw_B.std(correction=0),
        }
        if reference_BS is not None and divergence_BS is not None:
            figures["ref_logp"] = token_mean(reference_BS, inputs)
            figures["kl"] = token_mean(divergence_BS, inputs)
        return (losses_BS * inputs.targets.weights_BS).sum(), figures

    def _scores(
        self, model: Model, inputs: ModelInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Log-probabilities of the model and the reference, and the divergence between both, [B, S]."""
        kind, in_fp32 = self.settings.kl_impl, self.settings.fp32_reinforce
        if self.reference is None or kind != "full":
            policy_BS = token_scores(model, inputs, in_fp32=in_fp32, dtype=self.dtype)
            if self.reference is None:
                return policy_BS, None, None
            reference_BS = self.reference.token_scores(inputs, in_fp32=in_fp32, dtype=self.dtype)
            return policy_BS, reference_BS, divergence(policy_BS, reference_BS, kind=kind)
        policy_BSV = self._distributions(model, inputs)
        with torch.no_grad():
            assert self.reference.model is not None, "no log-probabilities of samples not drawn yet lie on disk"
            reference_BSV = self._distributions(self.reference.model, inputs)
        labels = inputs.targets.labels_BS[..., None]
        policy_BS, reference_BS = (scores.gather(2, labels).squeeze(2) for scores in (policy_BSV, reference_BSV))
        return policy_BS, reference_BS, full_divergence(policy_BSV, reference_BSV)

    def _distributions(self, model: Model, inputs: ModelInputs) -> torch.Tensor:
        """Log-probabilities of the whole vocabulary, [B, S, V]."""
        logits_BSV = model(inputs.tokens_BS, None, inputs.context)
        return torch.log_softmax(logits_BSV.float() if self.settings.fp32_reinforce else logits_BSV, dim=-1)
