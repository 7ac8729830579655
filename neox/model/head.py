"""The last layer: the output projection with the loss behind it, or the head of a reward model."""

import torch
from torch import nn

from neox.config import ModelConfig
from neox.model.loss import Labels, Targets, fused_linear_cross_entropy, fused_linear_log_probabilities
from neox.parallel.vocabulary import VocabularyRows


class OutputHead(nn.Module):
    """Projects the residual stream on the vocabulary.

    Called with targets it returns the loss without keeping logits. The loss happens inside this module's
    forward, because ZeRO 3 has the weight at hand only there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None, "the vocabulary is resolved before the model is built"
        self.final_linear = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.vocabulary: VocabularyRows = VocabularyRows(size=config.padded_vocab_size)

    def forward(self, x_BSD: torch.Tensor, targets: Targets | Labels | None = None) -> torch.Tensor:
        """Return logits [B, S, V] in the model's dtype, or what is asked for without making them all.

        That is the weighted sum of losses (fp32 scalar) of targets, the log-probabilities (fp32 [B, S]) of labels.
        """
        if targets is None:
            return self.vocabulary.collect(self.final_linear(x_BSD))
        if isinstance(targets, Labels):
            whole, weight = self.vocabulary.enter(x_BSD), self.final_linear.weight
            return fused_linear_log_probabilities(whole, weight, targets.labels_BS, vocabulary=self.vocabulary)
        return self.loss(x_BSD, self.final_linear.weight, targets)

    def loss(self, x_BSD: torch.Tensor, weight_VD: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The weighted sum of losses (fp32 scalar), the projection matrix given apart."""
        x_BSD = self.vocabulary.enter(x_BSD)
        return fused_linear_cross_entropy(x_BSD, weight_VD, targets, vocabulary=self.vocabulary)


def is_reward_head(name: str) -> bool:
    """Whether a parameter of this canonical name is the head of a reward model."""
    return name.endswith(".rm_linear.weight")


class RewardHead(nn.Module):
    """Gives each token a reward, in place of the output projection (Stiennon et al. 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rm_linear = nn.Linear(config.hidden_size, 1, bias=False)
        self.whole_sequence: nn.Module = nn.Identity()

    def forward(self, x_BSD: torch.Tensor, targets: Targets | Labels | None = None) -> torch.Tensor:
        """Return rewards [B, S] in the model's dtype; there is nothing else to ask for."""
        assert targets is None, "a reward model knows no tokens"
        return self.whole_sequence(self.rm_linear(x_BSD).squeeze(-1))
