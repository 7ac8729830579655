"""Embedding of tokens and, where asked for, of positions: the first layer."""

import torch
from torch import nn

from neox.config import ModelConfig
from neox.model.norms import build_norm
from neox.model.positions import sinusoidal_table


class Embedding(nn.Module):
    """Turns token ids into the residual stream: dropout(norm(token + position)), the norm only where asked for.

    Positions are learned rows (Radford et al. 2018, GPT), those of OPT shifted by `opt_pos_emb_offset` inside their
    table, or sinusoids (Vaswani et al. 2017, section 3.5). The norm is that of BLOOM (BigScience 2022, section 3.2).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.padded_vocab_size is not None, "the vocabulary is resolved before the model is built"
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size) if config.pos_emb == "learned" else None
        )
        self.position_offset = config.opt_pos_emb_offset
        self.is_sinusoidal = config.pos_emb == "sinusoidal"
        self.embedding_norm = build_norm(config) if config.embedding_norm else nn.Identity()
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, tokens_BS: torch.Tensor, positions_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Embed int64 ids [B, S] -> [B, S, D]; positions are 0..S-1 unless given."""
        x_BSD = self.word_embeddings(tokens_BS)
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        if self.position_embeddings is not None:
            x_BSD = x_BSD + self.position_embeddings(positions_BS + self.position_offset)
        if self.is_sinusoidal:
            x_BSD = x_BSD + sinusoidal_table(positions_BS, x_BSD.shape[-1]).to(x_BSD.dtype)
        return self.hidden_dropout(self.embedding_norm(x_BSD))
