"""Rotary position embedding (Su et al. 2021, "RoFormer", section 3.4; partial, as in GPT-J and GPT-NeoX-20B)."""

import torch
from torch import nn

from neox.config import ModelConfig


class RotaryEmbedding(nn.Module):
    """Rotates the first `rotary_ndims` dimensions of every head by an angle that grows with the position.

    Dimensions i and i + R of a head, R being half of `rotary_ndims`, are the two coordinates of one plane. The
    angles are computed in fp32 and the tables take the dtype of the model when it is cast, which is also what
    upstream and `transformers` do.
    """

    cos_SR: torch.Tensor
    sin_SR: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ndims = config.rotary_ndims
        self.base = float(config.rotary_emb_base)
        self.max_positions = max(config.seq_length, config.max_position_embeddings)
        self.reset_buffers(torch.get_default_device())

    def reset_buffers(self, device: torch.device) -> None:
        """Build the tables on `device`; called again when a model made on the meta device gets its memory."""
        exponent = torch.arange(0, self.ndims, 2, dtype=torch.float32, device=device) / self.ndims
        positions = torch.arange(self.max_positions, dtype=torch.float32, device=device)
        angles = torch.outer(positions, 1.0 / self.base**exponent)
        self.register_buffer("cos_SR", angles.cos(), persistent=False)
        self.register_buffer("sin_SR", angles.sin(), persistent=False)

    def forward(self, x_BSNH: torch.Tensor, positions_BS: torch.Tensor | None = None) -> torch.Tensor:
        """Rotate heads.

        Args:
            x_BSNH: queries or keys.
            positions_BS: position of each token, int64; None means 0..S-1 in every row.
        """
        where = slice(0, x_BSNH.shape[1]) if positions_BS is None else positions_BS
        cos, sin = self.cos_SR[where].unsqueeze(-2), self.sin_SR[where].unsqueeze(-2)
        half = self.ndims // 2
        first, second, untouched = x_BSNH.split((half, half, x_BSNH.shape[-1] - self.ndims), dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, untouched), dim=-1)
