"""Checkpoints of random weights of any size, made without holding more than a tensor."""

import zlib
from pathlib import Path

import torch
import yaml

from benchmarks.shapes import Shape
from neox.checkpoint.upstream.write import UpstreamLayout, UpstreamWriter
from neox.checkpoint.weight_map import weight_map
from neox.config import Config

BLOCK = 2**24
"""Numbers of the block that all tensors are taken from."""


class SyntheticWeights:
    """Weights that look random and cost little: one block of normal numbers, entered elsewhere for each tensor.

    Args:
        config: the run whose model it is; the weights have its precision.
    """

    folder = Path("synthetic")

    def __init__(self, config: Config, *, dtype: torch.dtype = torch.float16) -> None:
        self._tensors = weight_map(config.model)
        self.padded_vocab_size = config.model.padded_vocab_size or 0
        generator = torch.Generator().manual_seed(0)
        self._block = (0.02 * torch.randn(BLOCK, generator=generator)).to(dtype)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """Canonical names of all parameters."""
        return list(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """One of them."""
        shape = self._tensors[name].shape
        flat = torch.empty(shape.numel(), dtype=self._block.dtype)
        start = zlib.crc32(name.encode()) % BLOCK
        for position in range(0, len(flat), BLOCK):
            part = flat[position : position + BLOCK]
            head = min(len(part), BLOCK - start)
            part[:head] = self._block[start : start + head]
            part[head:] = self._block[: len(part) - head]
        return flat.view(shape)


def write_run(shape: Shape, folder: Path, *, tensor_size: int) -> Path:
    """Write a model in fp16 as GPT-NeoX's pipeline layout has it, and its configuration beside the folder.

    Returns:
        The configuration, a YAML file.
    """
    config = shape.config(sequence=2048, precision="fp16")
    path = folder.with_name("model.yml")
    path.write_text(yaml.safe_dump(config.to_flat()), encoding="utf-8")
    layout = UpstreamLayout(pipe=1, tensor=tensor_size)
    UpstreamWriter(SyntheticWeights(config), config, layout=layout).write(folder)
    return path


def largest_tensor(shape: Shape) -> int:
    """Bytes of the largest parameter in fp16."""
    tensors = weight_map(shape.config(sequence=2048).model).values()
    return max(tensor.shape.numel() for tensor in tensors) * torch.float16.itemsize
