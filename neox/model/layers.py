"""The decoder as an ordered list of layers, and the plain model that runs through it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neox.config import ModelConfig
from neox.model.attention import PLAIN, AttentionContext
from neox.model.block import TransformerBlock
from neox.model.embedding import Embedding
from neox.model.head import OutputHead
from neox.model.loss import Targets

EMBEDDING_INDEX = 0


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

    count = config.num_layers
    return [
        LayerSpec(EMBEDDING_INDEX, lambda: Embedding(config)),
        *(LayerSpec(2 + i, lambda: TransformerBlock(config)) for i in range(count)),
        LayerSpec(count + 3, final_norm),
        LayerSpec(count + 4, lambda: OutputHead(config)),
    ]


class FinalNorm(nn.Module):
    """The norm before the output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)

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
        tie_embeddings(self)

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

    def hidden(self, tokens_BS: torch.Tensor, contexts: Sequence[AttentionContext] | None = None) -> torch.Tensor:
        """Output of the final norm, [B, S, D]; `contexts` gives each block its decoding context."""
        positions = None if contexts is None else contexts[0].positions_BS
        x_BSD = self.embedding(tokens_BS, positions)
        if contexts is not None:
            for block, context in zip(self.blocks, contexts, strict=True):
                x_BSD = block(x_BSD, context)
        else:
            x_BSD = self._run_blocks(x_BSD)
        return self.layers[str(self.config.num_layers + 3)](x_BSD)

    def _run_blocks(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """All blocks, recomputing segments of `recompute_every` blocks in the backward pass if that is not 0."""
        blocks = self.blocks
        if not (self.recompute_every and self.training and torch.is_grad_enabled()):
            for block in blocks:
                x_BSD = block(x_BSD)
            return x_BSD
        for start in range(0, len(blocks), self.recompute_every):
            segment = blocks[start : start + self.recompute_every]
            x_BSD = cast(torch.Tensor, checkpoint(_run, segment, x_BSD, use_reentrant=False))
        return x_BSD

    def forward(
        self,
        tokens_BS: torch.Tensor,
        targets: Targets | None = None,
        contexts: Sequence[AttentionContext] | None = None,
    ) -> torch.Tensor:
        """Logits [B, S, V] of int64 ids [B, S], or the loss (fp32 scalar) where targets are given."""
        return self.head(self.hidden(tokens_BS, contexts), targets)


def _run(blocks: Sequence[nn.Module], x_BSD: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        x_BSD = block(x_BSD, PLAIN)
    return x_BSD


def tie_embeddings(model: Decoder) -> None:
    """Make the head use the embedding matrix unless the config unties them (Press & Wolf 2017)."""
    if not model.config.no_weight_tying:
        model.head.final_linear.weight = model.embedding.word_embeddings.weight


def canonical_parameters(model: Decoder) -> dict[str, nn.Parameter]:
    """Parameters under their canonical names; a tied head appears only as the embedding."""
    return dict(model.named_parameters())
