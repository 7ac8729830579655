"""The process grid: pipeline slowest, then data, tensor fastest, as megatron-core and DeepSpeed lay it out."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from neox.config import Config
from neox.errors import LaunchError
from neox.parallel.agreement import agree_on_software
from neox.parallel.rendezvous import GROUP_TIMEOUT, join_world

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Mesh:
    """Sizes, coordinates and groups of this process.

    Attributes:
        pipe_size, data_size, tensor_size: lengths of the three axes.
        rank, local_rank: number among all processes, and among those of this host.
        device: where this process computes.
        tensor_group, data_group: ranks that differ from this one only along that axis.
    """

    pipe_size: int = 1
    data_size: int = 1
    tensor_size: int = 1
    rank: int = 0
    local_rank: int = 0
    device: torch.device = CPU
    tensor_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pipe_size * self.data_size * self.tensor_size

    @property
    def tensor_rank(self) -> int:
        """Coordinate along the tensor axis."""
        return self.coordinates(self.rank)[2]

    @property
    def data_rank(self) -> int:
        """Coordinate along the data axis."""
        return self.coordinates(self.rank)[1]

    @property
    def pipe_rank(self) -> int:
        """Pipeline stage."""
        return self.coordinates(self.rank)[0]

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Pipeline stage, data rank and tensor rank of any rank."""
        rest, tensor_rank = divmod(rank, self.tensor_size)
        stage, data_rank = divmod(rest, self.data_size)
        return stage, data_rank, tensor_rank

    # What DeepSpeed asks of the object it calls `mpu`.

    def get_model_parallel_rank(self) -> int:
        """Coordinate along the tensor axis."""
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Length of the tensor axis."""
        return self.tensor_size

    def get_model_parallel_group(self) -> ProcessGroup | None:
        """Ranks along the tensor axis."""
        return self.tensor_group

    def get_data_parallel_rank(self) -> int:
        """Coordinate along the data axis."""
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Length of the data axis."""
        return self.data_size

    def get_data_parallel_group(self) -> ProcessGroup | None:
        """Ranks along the data axis."""
        return self.data_group


def build_mesh(config: Config, *, when_joined: Callable[[], None] | None = None) -> Mesh:
    """Join the process group that RANK, WORLD_SIZE and MASTER_ADDR describe and make the groups of the mesh.

    Without a GPU the library is gloo, whatever `distributed_backend` says. The configuration has
    already been checked against WORLD_SIZE.

    Args:
        config: the run.
        when_joined: called as soon as all processes have met, before they do anything else together.
    """
    world, local_rank = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    tensor, pipe = config.parallel.model_parallel_size, config.parallel.pipeline_stages
    if tensor > 1:
        # Overlapping a reduction with the matrix product behind it relies on kernels starting in order. CUDA reads
        # this when it starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = _own_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed remarks that it found no other
    if not dist.is_initialized():
        backend = config.training.distributed_backend if device.type == "cuda" else "gloo"
        join_world(backend, timedelta(seconds=config.reliability.distributed_timeout))
        if when_joined is not None:
            when_joined()
        agree_on_software(device)
    tensor_group, data_group = _groups(tensor, pipe)
    return Mesh(
        pipe_size=pipe,
        data_size=world // (tensor * pipe),
        tensor_size=tensor,
        rank=dist.get_rank(),
        local_rank=local_rank,
        device=device,
        tensor_group=tensor_group,
        data_group=data_group,
    )


def _own_device(local_rank: int) -> torch.device:
    """The GPU of this process, or the CPU where there is none.

    Slurm can show each task its own GPU only; that one is then number 0 whatever the local rank, for DeepSpeed too.

    Raises:
        LaunchError: more processes than GPUs on this host.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and local_rank > 0:
        os.environ["LOCAL_RANK"] = "0"
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise LaunchError(f"local rank {local_rank}: this host shows {count} GPUs; start one process for each")
    return torch.device("cuda", local_rank)


def _groups(tensor: int, pipe: int) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """The tensor and the data group of this rank; megatron-core makes them where a model is divided at all."""
    if tensor * pipe == 1:
        return None, dist.group.WORLD
    parallel_state = import_megatron()
    parallel_state.initialize_model_parallel(
        tensor,
        pipe,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=GROUP_TIMEOUT.total_seconds() / 60,
    )
    return parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()


def import_megatron() -> ModuleType:
    """Import megatron-core without its remarks on packages that this project does not use; return its parallel state.

    It asks `torch.cuda.current_device()` wherever it makes a tensor, so where there is no CUDA device that is made to
    mean the CPU. This is the only place that touches it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core.tensor_parallel  # noqa: F401
        from megatron.core import parallel_state
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    return parallel_state
