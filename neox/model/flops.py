"""Floating-point operations of the GPT-NeoX decoder, counted exactly from its shapes.

What is counted: every multiplication and addition of every matrix product, 2 m n k for [m, k] x [k, n], at
the vocabulary size that is really computed (padded). What is not: embedding look-ups (no product), biases,
norms, activations, softmax, position encodings, dropout, LoRA's factors, the optimizer; together below 1% at any
useful width. Per token and block, with D hidden, Q the rows of the fused projection (3D, or fewer where groups of
heads share keys and values), F the inner width of the MLP, G 1 or for a gated MLP 2, A keys that a query attends
to on average:

    query_key_value   2 D Q         scores q k^T      2 A D        linear1   2 D G F
    dense             2 D D         weighted values   2 A D        linear2   2 F D

and 2 D V for the head, 2 D for that of a reward model. In a block with E experts, of which a token goes to C, the
router takes 2 D E, and linear1 and linear2 count C times. Shared keys and values do not change the work of attention:
each query head still meets all its keys. A is S for full attention (what a kernel without causal skipping computes, and
the usual definition of model FLOPs in papers) and (S + 1) / 2 for causal attention (what the model needs). Where a
sliding window lets a query see W < S keys, its own included, they are W, and W (1 - (W - 1) / 2S). The backward pass
takes two products for each forward one, by the inputs and by the weights: twice the forward FLOPs. LoRA trains no
matrix, which leaves each product but those of attention one. (The very first has none, as nothing below it is trained.)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from neox.config import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token.

    Attributes:
        blocks: forward pass of all transformer blocks.
        head: forward pass of the output projection.
        frozen: of both, products with weights that are not trained.
    """

    blocks: float
    head: float
    frozen: float = 0.0

    @property
    def forward(self) -> float:
        """One forward pass."""
        return self.blocks + self.head

    @property
    def backward(self) -> float:
        """One backward pass."""
        return 2 * self.forward - self.frozen

    @property
    def model(self) -> float:
        """A training step without recomputation, the numerator of MFU (Chowdhery et al. 2022, appendix B)."""
        return self.forward + self.backward

    def hardware(self, *, checkpoint_activations: bool) -> float:
        """Return the FLOPs of a step as executed, the numerator of HFU: checkpointed blocks run forward once more."""
        return self.model + (self.blocks if checkpoint_activations else 0.0)


def flops_per_token(config: "ModelConfig", *, causal: bool, frozen: bool = False) -> TokenFlops:
    """Count the FLOPs per token of sequences of `seq_length` tokens.

    Args:
        config: shapes; `padded_vocab_size` must be resolved.
        causal: count only the keys that a causal query sees, (S + 1) / 2 on average, instead of all S.
        frozen: whether no matrix is trained, as with LoRA.
    """
    assert config.padded_vocab_size is not None, "the vocabulary must be resolved before FLOPs are counted"
    hidden = config.hidden_size
    before = config.sliding_window_width
    keys = keys_per_query(config.seq_length, window=None if before is None else before + 1, causal=causal)
    linears = 2 * hidden * (config.qkv_width + hidden) * config.num_layers
    mlp = 2 * hidden * (config.linear1_width + config.mlp_inner_width)
    with_experts = len(config.expert_layers)
    mlps = mlp * (config.num_layers - with_experts + config.moe_top_k * with_experts)
    routers = 2 * hidden * config.moe_num_experts * with_experts
    products = linears + mlps + routers
    attention = config.num_layers * (2 * keys * hidden + 2 * keys * hidden)
    head = 2 * hidden * (1 if config.has_reward_head else config.padded_vocab_size)
    return TokenFlops(float(products + attention), float(head), frozen=float(products + head) if frozen else 0.0)


def keys_per_query(length: int, *, window: int | None, causal: bool) -> float:
    """Average number of keys of a query in a sequence of `length` tokens, itself included.

    Args:
        length: tokens of the sequence.
        window: keys that a query sees at most, its own included; None means all.
        causal: leave out the keys after each query, instead of counting as many for every query as the last one sees.
    """
    width = min(length, window or length)
    # The first `width` queries see 1, 2, ... keys, the others `width` each.
    return (width * (width + 1) / 2 + (length - width) * width) / length if causal else width
