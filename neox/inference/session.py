"""The processes of generation and evaluation: tensor-parallel groups, and copies of them that share the work."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from neox.config import Config
from neox.errors import LaunchError
from neox.launch.environment import Placement
from neox.parallel.mesh import Mesh, build_mesh
from neox.watch import watched


def without_pipeline(config: Config) -> Config:
    """Set one pipeline stage: checkpoints of any layout are read into the plain decoder."""
    parallel = config.parallel.model_copy(update={"pipe_parallel_size": 0})
    return config.model_copy(update={"parallel": parallel})


def replica_workers(config: Config, *, copies: bool) -> int:
    """Workers to start on this machine: one tensor-parallel group, or as many as its GPUs hold.

    Args:
        config: without a pipeline.
        copies: whether the work can be shared among copies of the model.
    """
    tensor = config.parallel.model_parallel_size
    if not copies:
        return tensor
    devices = min(torch.cuda.device_count(), config.launch.num_gpus or torch.cuda.device_count())
    return max(1, devices // tensor) * tensor


@contextmanager
def join(config: Config, placement: Placement | None) -> Iterator[Mesh]:
    """Become the rank that `placement` says, whose variables are in the environment; leave the group at the end.

    Args:
        config: without a pipeline.
        placement: None for a process on its own.

    Raises:
        LaunchError: the number of processes is no multiple of model_parallel_size.
    """
    world, tensor = placement.world_size if placement else 1, config.parallel.model_parallel_size
    if world % tensor:
        raise LaunchError(
            f"model_parallel_size is {tensor} and {world} processes were started; start a multiple of {tensor}"
        )
    if world == 1:
        yield Mesh(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    with watched(config) as watch:
        yield build_mesh(config, when_joined=watch.begin)
        dist.destroy_process_group()
