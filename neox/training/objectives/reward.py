"""Reward models, trained on pairs."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch.nn.functional import logsigmoid

from neox.training.batches import ModelInputs
from neox.training.objectives.objective import Figures, Model
from neox.training.objectives.scores import scored


def reward_loss(pos: torch.Tensor, neg: torch.Tensor, *, z_loss: float) -> torch.Tensor:
    """Equation 1 of Ouyang et al. 2022, "Training language models to follow instructions", for pairs, mean over them.

    That is the negative log-likelihood of Bradley and Terry's model (1952). To it comes `z_loss` times the squares of
    both rewards, which keeps them near 0: the difference alone leaves their level free.

    Args:
        pos: rewards of the preferred documents, [B].
        neg: rewards of the rejected ones.
        z_loss: weight of the squares.
    """
    return -logsigmoid(pos - neg).mean() + z_loss * (pos.square() + neg.square()).mean()


def last_scored(values_BS: torch.Tensor, inputs: ModelInputs) -> torch.Tensor:
    """The value at the last token of each row whose label counts, [B]."""
    places_S = torch.arange(1, values_BS.shape[1] + 1, device=values_BS.device)
    last_B = (scored(inputs) * places_S).argmax(-1)
    return values_BS.gather(1, last_B[:, None]).squeeze(1)


class RewardModel:
    """Pairs that lie behind each other in the batch: all preferred documents, then all rejected ones.

    Args:
        z_loss: see `reward_loss`.
    """

    recorded: Mapping[str, str] = MappingProxyType({})

    def __init__(self, z_loss: float) -> None:
        self.z_loss = z_loss

    def __call__(self, model: Model, inputs: ModelInputs) -> tuple[torch.Tensor, Figures]:
        """See Objective."""
        values_BS = model(inputs.tokens_BS, None, inputs.context).float()
        pos, neg = last_scored(values_BS, inputs).chunk(2)
        margins = (pos - neg).detach()
        figures = {
            "pos_values": pos.detach().mean(),
            "neg_values": neg.detach().mean(),
            "margin": margins.mean(),
            "accuracy": (margins > 0).float().mean(),
        }
        return reward_loss(pos, neg, z_loss=self.z_loss), figures
