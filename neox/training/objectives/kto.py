"""KTO: documents that are good or bad by themselves, without a partner."""

import torch

from neox.training.batches import ModelInputs
from neox.training.objectives.objective import Figures, Model
from neox.training.objectives.scores import WithReference, token_mean, token_scores


def kto_loss(
    ratios_B: torch.Tensor, rewards_B: torch.Tensor, *, beta: float, desirable: float, undesirable: float
) -> torch.Tensor:
    """KTO's loss (Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization"), mean over rows.

    The paper's lambda - v is weight (1 - sigmoid(beta r (ratio - z0))), with r = 1 for a desirable document and -1 for
    an undesirable one; another r scales beta. Its reference point z0, how far the model has moved from the reference,
    is estimated on completions other than the one it is used for: on the other half of the micro-batch, as the mean of
    max(0, ratio). No gradient flows through it.

    Args:
        ratios_B: log(pi / pi_ref) of each completion; B is even.
        rewards_B: its sign says whether a document is desirable; 0 takes no part.
        beta: strength of the pull towards the reference.
        desirable: weight of documents with a reward above 0.
        undesirable: weight of those with one below 0.
    """
    first, second = ratios_B.detach().clamp(min=0.0).chunk(2)
    origins_B = torch.cat((second.mean().expand_as(first), first.mean().expand_as(second)))
    weights_B = desirable * (rewards_B > 0) + undesirable * (rewards_B < 0)
    return (weights_B * (1.0 - torch.sigmoid(beta * rewards_B * (ratios_B - origins_B)))).mean()


class KahnemanTversky(WithReference):
    """KTO over documents with rewards."""

    def __call__(self, model: Model, inputs: ModelInputs) -> tuple[torch.Tensor, Figures]:
        """See Objective."""
        assert self.reference is not None, "KTO has a reference, live or on disk"
        settings, rewards_B = self.settings, inputs.extras["rewards"]
        policy_BS = token_scores(model, inputs, in_fp32=settings.kto_fp32, dtype=self.dtype)
        reference_BS = self.reference.token_scores(inputs, in_fp32=settings.kto_fp32, dtype=self.dtype)
        ratios_B = (policy_BS - reference_BS).sum(-1)
        loss = kto_loss(
            ratios_B,
            rewards_B,
            beta=settings.kto_beta,
            desirable=settings.kto_desirable_weight,
            undesirable=settings.kto_undesirable_weight,
        )
        policy_B, reference_B = policy_BS.detach().sum(-1), reference_BS.sum(-1)
        gains_B = settings.kto_beta * rewards_B * ratios_B.detach()
        figures = {
            "ref_logp": reference_B.mean(),
            "policy_logp": policy_B.mean(),
            "pos_ref_logp": (reference_B * (rewards_B > 0)).mean(),
            "neg_ref_logp": (reference_B * (rewards_B < 0)).mean(),
            "pos_policy_logp": (policy_B * (rewards_B > 0)).mean(),
            "neg_policy_logp": (policy_B * (rewards_B < 0)).mean(),
            "kl": token_mean(policy_BS - reference_BS, inputs),
            "reward_acc": (gains_B > 0).float().mean(),
            "policy_rewards": gains_B.mean(),
        }
        return loss, figures
