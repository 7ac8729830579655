"""Direct preference optimisation."""

import torch
from torch.nn.functional import logsigmoid

from neox.training.batches import ModelInputs
from neox.training.objectives.objective import Figures, Model
from neox.training.objectives.scores import WithReference, token_scores


def dpo_loss(ratios_pos: torch.Tensor, ratios_neg: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Equation 7 of Rafailov et al. 2023, "Direct Preference Optimization", mean over pairs.

    Args:
        ratios_pos: log(pi / pi_ref) of the preferred completions, [B].
        ratios_neg: the same of the rejected ones.
        beta: strength of the pull towards the reference.
    """
    return -logsigmoid(beta * (ratios_pos - ratios_neg)).mean()


class DirectPreference(WithReference):
    """DPO over pairs that lie behind each other in the batch: all preferred documents, then all rejected ones.

    Without a reference it is uniform (`dpo_reference_free`).
    """

    def __call__(self, model: Model, inputs: ModelInputs) -> tuple[torch.Tensor, Figures]:
        """See Objective."""
        beta, in_fp32 = self.settings.dpo_beta, self.settings.dpo_fp32
        scores = token_scores(model, inputs, in_fp32=in_fp32, dtype=self.dtype).sum(-1)
        pos, neg = scores.chunk(2)
        figures = {"chosen_neg": neg.detach().mean(), "chosen_pos": pos.detach().mean()}
        if self.reference is None:
            return dpo_loss(pos, neg, beta=beta), figures
        ref_pos, ref_neg = self.reference.token_scores(inputs, in_fp32=in_fp32, dtype=self.dtype).sum(-1).chunk(2)
        chosen, rejected = beta * (pos - ref_pos).detach(), beta * (neg - ref_neg).detach()
        figures |= {
            "ref_neg": ref_neg.mean(),
            "ref_pos": ref_pos.mean(),
            "chosen_rewards": chosen.mean(),
            "rejected_rewards": rejected.mean(),
            "reward_acc": (chosen > rejected).float().mean(),
            "margins": (chosen - rejected).mean(),
        }
        return dpo_loss(pos - ref_pos, neg - ref_neg, beta=beta), figures
