"""The decoder as an ordered list of layers, and the plain model that runs through it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neox.config import ModelConfig
from neox.model.attention import PLAIN, AttentionContext, with_shared_mask
from neox.model.block import TransformerBlock
from neox.model.embedding import Embedding
from neox.model.head import OutputHead, RewardHead
from neox.model.loss import Labels, Targets
from neox.model.norms import build_norm
from neox.model.positions import share_tables

EMBEDDING_INDEX = 0
Contexts = AttentionContext | Sequence[AttentionContext] | None
_InContext = Sequence[tuple[TransformerBlock, AttentionContext]]


@dataclass(frozen=True)
class LayerSpec:
    """One layer of the list.

    Attributes:
        disk_index: its number in checkpoints. Upstream's numbering has gaps where it keeps
            layers without parameters (1 and N+2).
        build: makes the layer, with all parameters uninitialised or as torch leaves them.
    """

    disk_index: int
    build: Callable[[], nn.Module]


def layer_list(config: ModelConfig) -> list[LayerSpec]:
    """Embedding, N blocks, final norm, output head: one definition for every engine."""

    def final_norm() -> nn.Module:
        return FinalNorm(config)

    count, with_experts = config.num_layers, config.expert_layers
    return [
        LayerSpec(EMBEDDING_INDEX, lambda: Embedding(config)),
        *(LayerSpec(2 + i, partial(TransformerBlock, config, has_experts=i in with_experts)) for i in range(count)),
        LayerSpec(count + 3, final_norm),
        LayerSpec(count + 4, lambda: RewardHead(config) if config.has_reward_head else OutputHead(config)),
    ]


class FinalNorm(nn.Module):
    """The norm before the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = build_norm(config)

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.norm(x_BSD)


class Decoder(nn.Module):
    """All layers in one process (or one tensor-parallel rank).

    Parameters are named `layers.<disk index>.<name>`, the canonical names of the project.
    """

    def __init__(self, config: ModelConfig, *, layers: Sequence[nn.Module] | None = None) -> None:
        super().__init__()
        specs = layer_list(config)
        built = [spec.build() for spec in specs] if layers is None else list(layers)
        self.config = config
        self.layers = nn.ModuleDict({str(spec.disk_index): layer for spec, layer in zip(specs, built, strict=True)})
        self.recompute_every = 0
        self.run_segment: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        tie_embeddings(self)
        share_tables(self)

    @property
    def embedding(self) -> Embedding:
        """The first layer."""
        return cast(Embedding, self.layers[str(EMBEDDING_INDEX)])

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The transformer blocks in order."""
        return [cast(TransformerBlock, self.layers[str(2 + i)]) for i in range(self.config.num_layers)]

    @property
    def head(self) -> OutputHead:
        """The last layer."""
        return cast(OutputHead, self.layers[str(self.config.num_layers + 4)])

    def hidden(self, tokens_BS: torch.Tensor, contexts: Contexts = None) -> torch.Tensor:
        """Output of the final norm, [B, S, D]; see `forward`."""
        blocks = self.blocks
        first = contexts[0] if isinstance(contexts, Sequence) else contexts or PLAIN
        x_BSD = self.embedding(tokens_BS, first.positions_BS)
        if not isinstance(contexts, Sequence):
            contexts = [with_shared_mask(first, blocks[0].attention, x_BSD)] * len(blocks)
        x_BSD = self._run_blocks(x_BSD, list(zip(blocks, contexts, strict=True)))
        return self.layers[str(self.config.num_layers + 3)](x_BSD)

    def _run_blocks(self, x_BSD: torch.Tensor, blocks: _InContext) -> torch.Tensor:
        """All blocks, recomputing segments of `recompute_every` blocks in the backward pass if that is not 0."""
        if not (self.recompute_every and self.training and torch.is_grad_enabled()):
            return _run(blocks, x_BSD)
        for start in range(0, len(blocks), self.recompute_every):
            segment = blocks[start : start + self.recompute_every]
            x_BSD = cast(torch.Tensor, self.run_segment(_run, segment, x_BSD))
        return x_BSD

    def forward(
        self,
        tokens_BS: torch.Tensor,
        targets: Targets | Labels | None = None,
        contexts: Contexts = None,
    ) -> torch.Tensor:
        """Logits [B, S, V] of int64 ids [B, S], or what the head makes of targets (see `neox.model.head`).

        Args:
            tokens_BS: int64 ids.
            targets: what the model should have said.
            contexts: what blocks know beyond the hidden state: one that all share (the documents of packed rows),
                or one for each block (its cache while decoding).
        """
        return self.head(self.hidden(tokens_BS, contexts), targets)


def _run(blocks: _InContext, x_BSD: torch.Tensor) -> torch.Tensor:
    for block, context in blocks:
        x_BSD = block(x_BSD, context)
    return x_BSD


def tie_embeddings(model: Decoder) -> None:
    """Make the head use the embedding matrix unless the config unties them (Press & Wolf 2017)."""
    if not (model.config.no_weight_tying or model.config.has_reward_head):
        model.head.final_linear.weight = model.embedding.word_embeddings.weight


def canonical_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """Parameters under their canonical names; a tied head appears only as the embedding."""
    return dict(model.named_parameters())
