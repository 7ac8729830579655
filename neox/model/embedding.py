"""Token (and, where asked for, learned position) embedding: the first layer."""

import torch
from torch import nn

from neox.config import ModelConfig


class Embedding(nn.Module):
    """Turns token ids into the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None, "the vocabulary is resolved before the model is built"
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.pos_emb == "learned" else None
        )
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Embed int64 ids [B, S] -> [B, S, D]; positions are 0..S-1 unless given."""
        x_BSD = self.word_embeddings(tokens_BS)
        if self.position_embeddings is not None:
            if positions_BS is None:
                positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
            x_BSD = x_BSD + self.position_embeddings(positions_BS)
        return self.hidden_dropout(x_BSD)
