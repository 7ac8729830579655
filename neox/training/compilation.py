"""torch.compile, block by block."""

from collections.abc import Iterable

import torch
from torch import nn

from neox.config import Config
from neox.model.experts import Experts
from neox.parallel.mesh import Mesh


def compile_blocks(blocks: Iterable[nn.Module], config: Config, mesh: Mesh) -> None:
    """Compile each block in place if the key `compile` says so.

    Unset, it is on where it pays: on a GPU without tensor parallelism and below ZeRO 3 (megatron-core's layers and
    ZeRO 3's hooks break the graph).
    All blocks share one compiled graph, since they have the same code and shapes. Experts are left out of it: how many
    tokens each gets is another number every time.
    """
    wanted = config.model.compile
    if wanted is None:
        wanted = mesh.device.type == "cuda" and mesh.tensor_size == 1 and config.parallel.zero_stage < 3
    if wanted:
        for block in blocks:
            for module in block.modules():
                if isinstance(module, Experts):
                    module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
            block.compile()
