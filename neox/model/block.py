"""One transformer block."""

import torch
from torch import nn

from neox.config import ModelConfig
from neox.model.attention import PLAIN, Attention, AttentionContext
from neox.model.experts import Experts
from neox.model.mlp import MLP
from neox.model.norms import build_norm


class TransformerBlock(nn.Module):
    """Attention and MLP around the residual stream.

    Parallel (`gpt_j_residual`; Black et al. 2022, GPT-NeoX-20B, section 2.1): both branches read the same x, each
    through a norm of its own, or with `gpt_j_tied` through one (Wang & Komatsuzaki 2021, GPT-J).
    Sequential: the MLP reads the output of the attention (pre-norm, Radford et al. 2019).
    Either way experts can stand in for the MLP.
    """

    def __init__(self, config: ModelConfig, *, has_experts: bool = False) -> None:
        super().__init__()
        self.parallel_residual = config.gpt_j_residual
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = None if config.gpt_j_tied else build_norm(config)
        self.attention = Attention(config)
        self.mlp = Experts(config) if has_experts else MLP(config)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x_BSD: torch.Tensor, context: AttentionContext = PLAIN) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        attention, mlp, dropout = self.attention, self.mlp, self.hidden_dropout
        ln1, ln2 = self.input_layernorm, self.post_attention_layernorm
        if ln2 is None:
            y_BSD = ln1(x_BSD)
            return x_BSD + dropout(attention(y_BSD, context)) + dropout(mlp(y_BSD))
        if self.parallel_residual:
            return x_BSD + dropout(attention(ln1(x_BSD), context)) + dropout(mlp(ln2(x_BSD)))
        x_BSD = x_BSD + dropout(attention(ln1(x_BSD), context))
        return x_BSD + dropout(mlp(ln2(x_BSD)))
