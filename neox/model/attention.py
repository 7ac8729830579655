"""Causal multi-head self-attention with a fused query-key-value projection."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from neox.config import ModelConfig
from neox.model.positions import RotaryEmbedding


class LayerCache(Protocol):
    """Keys and values of the tokens a layer has already seen (see `neox.inference.cache`)."""

    def append(self, k_BSNH: torch.Tensor, v_BSNH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values; return all of them, [B, K, N, H] each."""
        ...


@dataclass(frozen=True)
class AttentionContext:
    """What attention must know beyond the hidden state when decoding; None everywhere while training.

    Attributes:
        positions_BS: position of each token, int64.
        mask_BSK: True where a query may see a key; None means causal.
        cache: the layer's keys and values so far.
    """

    positions_BS: torch.Tensor | None = None
    mask_BSK: torch.Tensor | None = None
    cache: LayerCache | None = None


PLAIN = AttentionContext()


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(H)) v through torch's SDPA, which never forms the S x S matrix where it can avoid it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self, q_BSNH: torch.Tensor, k_BKNH: torch.Tensor, v_BKNH: torch.Tensor, mask_BSK: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the weighted values, [B, S, N, H]."""
        out_BNSH = scaled_dot_product_attention(
            q_BSNH.transpose(1, 2),
            k_BKNH.transpose(1, 2),
            v_BKNH.transpose(1, 2),
            attn_mask=None if mask_BSK is None else mask_BSK[:, None],
            is_causal=mask_BSK is None,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return out_BNSH.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention. Rows of the fused projection are grouped by head: [N, (q, k, v), H]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        bias = config.use_bias_in_attn_linear
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.core = CoreAttention(config.attention_dropout)
        self.rotary = RotaryEmbedding(config) if config.pos_emb == "rotary" else None

    def forward(self, x_BSD: torch.Tensor, context: AttentionContext = PLAIN) -> torch.Tensor:
        """Mix tokens: [B, S, D] -> [B, S, D]."""
        qkv = self.query_key_value(x_BSD)
        batch, length = qkv.shape[:2]
        q_BSNH, k_BSNH, v_BSNH = qkv.view(batch, length, -1, 3, self.head_dim).unbind(3)
        if self.rotary is not None:
            q_BSNH, k_BSNH = (self.rotary(x, context.positions_BS) for x in (q_BSNH, k_BSNH))
        if context.cache is not None:
            k_BSNH, v_BSNH = context.cache.append(k_BSNH, v_BSNH)
        out_BSNH = self.core(q_BSNH, k_BSNH, v_BSNH, context.mask_BSK)
        return self.dense(out_BSNH.reshape(batch, length, -1))
