"""One transformer block."""

import torch
from torch import nn

from neox.config import ModelConfig
from neox.model.attention import PLAIN, Attention, AttentionContext
from neox.model.mlp import MLP


class TransformerBlock(nn.Module):
    """Attention and MLP around the residual stream.

    Parallel (`gpt_j_residual`; Wang & Komatsuzaki 2021, GPT-J): both branches read the same x.
    Sequential: the MLP reads the output of the attention (pre-norm, Radford et al. 2019).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel_residual = config.gpt_j_residual
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = Attention(config)
        self.mlp = MLP(config)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x_BSD: torch.Tensor, context: AttentionContext = PLAIN) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        attention, mlp, dropout = self.attention, self.mlp, self.hidden_dropout
        ln1, ln2 = self.input_layernorm, self.post_attention_layernorm
        if self.parallel_residual:
            return x_BSD + dropout(attention(ln1(x_BSD), context)) + dropout(mlp(ln2(x_BSD)))
        x_BSD = x_BSD + dropout(attention(ln1(x_BSD), context))
        return x_BSD + dropout(mlp(ln2(x_BSD)))
