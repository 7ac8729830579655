"""Where a token stands: rotary angles and their scalings, ALiBi's slopes, sinusoids.

Rotary position embedding is Su et al. 2021 ("RoFormer", section 3.4), partial as in GPT-J and GPT-NeoX-20B. Its
scalings stretch the angles of a model beyond the length it was trained on:

    linear    all angles divided by `factor`                                    Chen et al. 2023, section 2.3
    dynamic   a base that grows with the length of sequences ("NTK-aware")      Peng et al. 2023, section 3.1
    yarn      slow dimensions divided, fast ones kept, sharper attention        Peng et al. 2023, section 3.4
    llama3    the same in wavelengths                                           Dubey et al. 2024, section 3.2

The length that `dynamic` follows is `seq_length`, which all rows have in training. It is not the length of each prompt:
the keys in a cache, and all that deeper layers made of them, were computed before the length was known, so generation
with a cache would differ from generation without, and a document in a packed row from the document alone. To generate
beyond the length of training, set `seq_length` to it: the angles follow, as those of `transformers` do for an input
of that length.
"""

import math
from typing import Any

import torch
from torch import nn

from neox.config import ModelConfig


def longest_input(config: ModelConfig) -> int:
    """Tokens of the longest input of a model: of the sequences it was made for, whatever a run trains on.

    Angles that follow `seq_length` (dynamic NTK) are those of its inputs alone, so longer ones are not for it.
    """
    longest = max(config.seq_length, config.max_position_embeddings - config.opt_pos_emb_offset)
    if (config.rope_scaling or {}).get("rope_type") == "dynamic":
        return min(longest, max(config.seq_length, _trained_length(config)))
    return longest


def sinusoidal_table(positions: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Encode positions as sines and cosines (Vaswani et al. 2017, section 3.5).

    All sines come first, then all cosines, as upstream has it; the paper interleaves them.

    Args:
        positions: of any shape, int64.
        hidden_size: an even width D.

    Returns:
        fp32 [*positions.shape, D].
    """
    exponent = torch.arange(0, hidden_size, 2, dtype=torch.float32, device=positions.device) / hidden_size
    angles = positions.float()[..., None] / 10000.0**exponent
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """What each head subtracts from a score for every token of distance (Press et al. 2022, section 3).

    Where the number of heads is no power of two, the slopes are those of the power below and, for the heads that
    are left, every other one of the power above.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * power, 2)]
    return tuple(slopes + between[: heads - power])


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
        self.config = config
        self.ndims = config.rotary_ndims
        self.reset_buffers(torch.get_default_device())

    def reset_buffers(self, device: torch.device) -> None:
        """Build the tables on `device`; called again when a model made on the meta device gets its memory."""
        cos_SR, sin_SR = self._tables(device)
        self.register_buffer("cos_SR", cos_SR, persistent=False)
        self.register_buffer("sin_SR", sin_SR, persistent=False)

    def _tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        count = max(self.config.seq_length, self.config.max_position_embeddings)
        if device.type == "meta":  # torch would import its compiler to compute what has no values
            cos_SR, sin_SR = torch.empty(2, count, self.ndims // 2, device=device)
            return cos_SR, sin_SR
        frequencies, amplitude = rotary_frequencies(self.config, device)
        angles = torch.outer(torch.arange(count, dtype=torch.float32, device=device), frequencies)
        return angles.cos() * amplitude, angles.sin() * amplitude

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


def share_tables(model: nn.Module) -> None:
    """Keep one copy of the rotary tables, equal in all layers of a model: of long sequences they are gigabytes."""
    rotaries = [module for module in model.modules() if isinstance(module, RotaryEmbedding)]
    for rotary in rotaries[1:]:
        rotary.cos_SR, rotary.sin_SR = rotaries[0].cos_SR, rotaries[0].sin_SR


def rotary_frequencies(config: ModelConfig, device: torch.device) -> tuple[torch.Tensor, float]:
    """Angle per position of each plane, fp32 [rotary_ndims / 2], and the factor of all cosines and sines."""
    ndims, base, scaling = config.rotary_ndims, float(config.rotary_emb_base), config.rope_scaling or {}
    exponent = torch.arange(0, ndims, 2, dtype=torch.float32, device=device) / ndims
    plain = 1.0 / base**exponent
    match scaling.get("rope_type"):
        case "linear":
            return plain / scaling["factor"], 1.0
        case "dynamic":
            return 1.0 / (base * _dynamic_stretch(config)) ** exponent, 1.0
        case "llama3":
            return _llama3(plain, scaling), 1.0
        case "yarn":
            return _yarn(plain, base, scaling), _yarn_amplitude(scaling)
    return plain, 1.0


def _dynamic_stretch(config: ModelConfig) -> float:
    """What the base grows by at `seq_length`; 1 up to the length trained on, by default `max_position_embeddings`."""
    scaling, trained = config.rope_scaling or {}, _trained_length(config)
    factor, length = scaling["factor"], max(config.seq_length, trained)
    growth: float = factor * length / trained - (factor - 1)
    return growth ** (config.rotary_ndims / (config.rotary_ndims - 2))


def _trained_length(config: ModelConfig) -> int:
    scaling = config.rope_scaling or {}
    return int(scaling.get("original_max_position_embeddings", config.max_position_embeddings))


def _llama3(plain: torch.Tensor, scaling: dict[str, Any]) -> torch.Tensor:
    """Divide the planes that turn less than `low_freq_factor` times in the length trained on; blend up to `high`."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling["factor"] + kept * plain


def _yarn(plain: torch.Tensor, base: float, scaling: dict[str, Any]) -> torch.Tensor:
    """Keep planes that turn more than `beta_fast` times, divide those below `beta_slow`, blend by index between."""
    planes = len(plain)

    def plane_of(turns: float) -> float:
        return planes * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / math.log(base)

    first, last = plane_of(scaling.get("beta_fast") or 32), plane_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * planes - 1)
    if first == last:
        last += 0.001
    index = torch.arange(planes, dtype=torch.float32, device=plain.device)
    divided = ((index - first) / (last - first)).clamp(0, 1)
    return divided * plain / scaling["factor"] + (1 - divided) * plain


def _yarn_amplitude(scaling: dict[str, Any]) -> float:
    """Sharpen the softmax (Peng et al. 2023, equation 22), or as `attention_factor` or the two `mscale` say."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def sharpness(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    one, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return sharpness(one) / sharpness(all_dim) if one and all_dim else sharpness(1.0)
