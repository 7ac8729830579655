"""Causal self-attention with a fused query-key-value projection: multi-head, grouped-query and multi-query."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from neox.config import ModelConfig
from neox.model.masks import attention_mask
from neox.model.positions import RotaryEmbedding, alibi_slopes
from neox.model.qk_norm import build_qk_norm


class LayerCache(Protocol):
    """Keys and values of the tokens a layer has already seen (see `neox.inference.cache`)."""

    def append(self, k_BSNH: torch.Tensor, v_BSNH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values; return all of them, [B, K, N, H] each."""
        ...


@dataclass(frozen=True)
class AttentionContext:
    """What attention must know beyond the hidden state; None everywhere for plain causal training.

    Attributes:
        positions_BS: position of each token, int64.
        mask_BSK: True where a query may see a key; None means causal.
        cache: the layer's keys and values so far.
        documents_BS: number of each token's document within its row, int64; a query sees only keys of its own.
        scores_mask: the finished mask of `neox.model.masks`, [B or 1, N or 1, S, K], where one has been built for all
            layers; the window, ALiBi, `mask_BSK` and `documents_BS` are already in it.
    """

    positions_BS: torch.Tensor | None = None
    mask_BSK: torch.Tensor | None = None
    cache: LayerCache | None = None
    documents_BS: torch.Tensor | None = None
    scores_mask: torch.Tensor | None = None


PLAIN = AttentionContext()


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt(H)) v through torch's SDPA, which never forms the S x S matrix where it can avoid it."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(
        self, q_BSNH: torch.Tensor, k_BKNH: torch.Tensor, v_BKNH: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the weighted values, [B, S, N, H].

        Query head j uses key and value head j // (N / heads of it), as in Ainslie et al. 2023 (GQA), section 2.2.

        Args:
            q_BSNH: queries.
            k_BKNH: keys, of N heads or a divisor of N.
            v_BKNH: values, likewise.
            mask: see `neox.model.masks`; None for causal.
        """
        batch, queries, heads, _ = q_BSNH.shape
        shared = k_BKNH.shape[2] == v_BKNH.shape[2] < heads
        grouped = shared and mask is None and _handles_groups(q_BSNH)
        if shared and mask is not None and queries == 1:
            # One query a head: those of a group become rows of one product, and keys and values need no copy.
            q_BSNH = q_BSNH.unflatten(2, (v_BKNH.shape[2], -1)).squeeze(1).transpose(1, 2)
            mask = mask if mask.shape[1] == 1 else mask.squeeze(2).unflatten(1, (v_BKNH.shape[2], -1))
        elif not grouped:
            k_BKNH, v_BKNH = _repeat(k_BKNH, heads), _repeat(v_BKNH, heads)
        out_BNSH = scaled_dot_product_attention(
            q_BSNH.transpose(1, 2),
            k_BKNH.transpose(1, 2),
            v_BKNH.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=grouped,
        )
        if out_BNSH.shape[1] < heads:
            return out_BNSH.reshape(batch, 1, heads, -1)
        return out_BNSH.transpose(1, 2)


def _handles_groups(q: torch.Tensor) -> bool:
    """Whether SDPA has a kernel that shares heads; without one it forms the S x S matrix (torch 2.13, fp32 on CUDA)."""
    return not q.is_cuda or q.dtype != torch.float32


def _repeat(x_BKNH: torch.Tensor, heads: int) -> torch.Tensor:
    """Each head as often as needed for `heads`, side by side."""
    times = heads // x_BKNH.shape[2]
    return x_BKNH if times == 1 else x_BKNH.repeat_interleave(times, dim=2)


class Attention(nn.Module):
    """Self-attention.

    Rows of the fused projection are grouped by head, [N, (q, k, v), H], where each head has keys and values of its own;
    otherwise they are all queries, then all keys, then all values. Numbers of heads are read off the weights, of which
    a tensor rank holds a share.

    Attributes:
        slopes: ALiBi's, one for each head on this rank; empty without ALiBi.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.num_attention_heads // config.num_kv_heads
        self.window = config.sliding_window_width
        self.slopes = alibi_slopes(config.num_attention_heads) if config.pos_emb == "alibi" else ()
        bias = config.use_bias_in_attn_linear
        self.query_key_value = nn.Linear(config.hidden_size, config.qkv_width, bias=bias)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.qk_layernorm = build_qk_norm(config) if config.use_qk_layernorm else None
        self.core = CoreAttention(config.attention_dropout)
        self.rotary = RotaryEmbedding(config) if config.pos_emb == "rotary" else None

    def forward(self, x_BSD: torch.Tensor, context: AttentionContext = PLAIN) -> torch.Tensor:
        """Mix tokens: [B, S, D] -> [B, S, D]."""
        q_BSNH, k_BSNH, v_BSNH = self._project(x_BSD)
        if self.qk_layernorm is not None:
            # A parameter belongs to a query head, so the heads that share a key each get their own of it.
            q_BSNH, k_BSNH = self.qk_layernorm(q_BSNH), self.qk_layernorm(_repeat(k_BSNH, q_BSNH.shape[2]))
        q_BSNH, k_BKNH, v_BKNH = self._place(q_BSNH, k_BSNH, v_BSNH, context)
        mask = context.scores_mask
        if mask is None:
            mask = self.mask(context, queries=q_BSNH.shape[1], keys=k_BKNH.shape[1], like=q_BSNH)
        out_BSNH = self.core(q_BSNH, k_BKNH, v_BKNH, mask)
        return self.dense(out_BSNH.flatten(2))

    def mask(self, context: AttentionContext, *, queries: int, keys: int, like: torch.Tensor) -> torch.Tensor | None:
        """The mask of a context, in the dtype and on the device of `like`; the same for every layer of a model."""
        return attention_mask(
            queries=queries,
            keys=keys,
            window=self.window,
            slopes=self.slopes,
            mask_BSK=context.mask_BSK,
            documents_BS=context.documents_BS,
            dtype=like.dtype,
            device=like.device,
        )

    def _project(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [B, S, N, H], keys and values [B, S, N / group, H] of the heads on this rank."""
        qkv = self.query_key_value(x_BSD)
        batch, length = qkv.shape[:2]
        if self.group == 1:
            q, k, v = qkv.view(batch, length, -1, 3, self.head_dim).unbind(3)
            return q, k, v
        heads = qkv.view(batch, length, -1, self.head_dim)
        kv_heads = heads.shape[2] // (self.group + 2)
        q, k, v = heads.split((self.group * kv_heads, kv_heads, kv_heads), dim=2)
        return q, k, v

    def _place(
        self, q_BSNH: torch.Tensor, k_BSNH: torch.Tensor, v_BSNH: torch.Tensor, context: AttentionContext
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotate queries and keys to their positions, and put the keys and values so far before the new ones."""
        if self.rotary is not None:
            q_BSNH, k_BSNH = (self.rotary(x, context.positions_BS) for x in (q_BSNH, k_BSNH))
        if context.cache is not None:
            k_BSNH, v_BSNH = context.cache.append(k_BSNH, v_BSNH)
        return q_BSNH, k_BSNH, v_BSNH


def with_shared_mask(context: AttentionContext, attention: Attention, like: torch.Tensor) -> AttentionContext:
    """Build the mask once for all layers, before the first, where what is seen depends on the rows of the batch.

    Args:
        context: of a forward pass; `documents_BS` is known of all keys, and so of as many queries.
        attention: of any block.
        like: a tensor of the dtype and on the device of the model.
    """
    rows = context.documents_BS if context.mask_BSK is None else context.mask_BSK
    if rows is None or context.scores_mask is not None:
        return context
    mask = attention.mask(context, queries=rows.shape[1], keys=rows.shape[-1], like=like)
    return replace(context, scores_mask=mask)
