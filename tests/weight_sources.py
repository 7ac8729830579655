"""Weights out of nothing, for tests."""

from pathlib import Path

import torch

from neox.checkpoint.weights import check_shape
from neox.config import ModelConfig
from neox.model.build import meta_decoder


class RandomWeights:
    """Random values in every parameter, biases and norms included, so that nothing is trivially right."""

    folder = Path("random")

    def __init__(self, config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._tensors = {}
        for name, parameter in meta_decoder(config).named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if "norm" in name and name.endswith(("weight", "scale")) else 0.0
            self._tensors[name] = (centre + 0.15 * noise).to(dtype)
        self.padded_vocab_size = config.padded_vocab_size or 0

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Canonical names."""
        return list(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One of them."""
        return self._tensors[name]

    def weight(self, name: str, shape: torch.Size) -> torch.Tensor:
        """One of them, checked."""
        check_shape(self.folder, name, self._tensors[name].shape, shape)
        return self._tensors[name]
