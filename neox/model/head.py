"""The output projection and the loss behind it: the last layer."""

import torch
from torch import nn

from neox.config import ModelConfig
from neox.model.loss import Targets, fused_linear_cross_entropy
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

    def forward(self, x_BSD: torch.Tensor, targets: Targets | None = None) -> torch.Tensor:
        """Return logits [B, S, V] in the model's dtype, or with targets the weighted sum of losses (fp32 scalar)."""
        if targets is None:
            return self.vocabulary.collect(self.final_linear(x_BSD))
        return self.loss(x_BSD, self.final_linear.weight, targets)

    def loss(self, x_BSD: torch.Tensor, weight_VD: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The weighted sum of losses (fp32 scalar), the projection matrix given apart."""
        x_BSD = self.vocabulary.enter(x_BSD)
        return fused_linear_cross_entropy(x_BSD, weight_VD, targets, vocabulary=self.vocabulary)
