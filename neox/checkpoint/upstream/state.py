"""What GPT-NeoX saves beside the weights of a rank, for weights that come without a run.

    module .. frozen_param_fragments   DeepSpeed's; `module` is None in the pipeline layout
    optimizer, lr_scheduler            None: there are no moments, and so no schedule to go on with
    global_steps, skipped_steps        the iteration, none skipped
    dp_world_size, mp_world_size       1, and tensor times pipeline ranks; compared for ZeRO's optimizer state only
    iteration, args                    where to go on counting; sizes that must equal the configuration's
    *_rng_state, rng_tracker_states    generators seeded as at the start of a run: the state of no run is known

Random-number states are plain integers and byte tensors, so that the file opens with `weights_only=True`; GPT-NeoX's
own hold a numpy array, which needs more.
"""

import random
import struct
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from neox.config import Config

TRACKER = "model-parallel-rng"
TRACKER_OFFSET = 2718
"""Added to the seed, with the tensor rank, by Megatron-LM (mpu/random.py) for dropout that differs between ranks."""

ARGUMENTS = (
    *("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"),
    *("make_vocab_size_divisible_by", "padded_vocab_size"),
)


def rank_state(
    config: Config, *, module: Mapping[str, torch.Tensor] | None, tensor_rank: int, iteration: int, samples: int
) -> dict[str, Any]:
    """Make the content of an `mp_rank_*` file.

    Args:
        config: the model at the layout that is written.
        module: the rank's weights in the sequential layout.
        tensor_rank: rank in its tensor-parallel group.
        iteration: iterations trained.
        samples: training sequences read.
    """
    parallel = config.parallel
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": None,
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": iteration,
        "global_samples": samples,
        "dp_world_size": 1,
        "mp_world_size": parallel.model_parallel_size * max(1, parallel.pipe_parallel_size),
        "ds_config": {},
        "ds_version": version("deepspeed"),
        "iteration": iteration,
        "args": _arguments(config),
        **_random_states(config.training.seed, tensor_rank),
    }


def _arguments(config: Config) -> dict[str, Any]:
    return {name: getattr(config.model, name) for name in ARGUMENTS} | {
        "tokenizer_type": config.tokenizer.tokenizer_type,
        "model_parallel_size": config.parallel.model_parallel_size,
    }


def _random_states(seed: int, tensor_rank: int) -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.RandomState(seed).get_state()
    return {
        "random_rng_state": random.Random(seed).getstate(),
        "np_rng_state": (str(kind), tuple(map(int, keys)), int(position), int(has_gauss), float(gauss)),
        "torch_rng_state": torch.Generator().manual_seed(seed).get_state(),
        "cuda_rng_state": _cuda_state(seed),
        "rng_tracker_states": {TRACKER: _cuda_state(seed + TRACKER_OFFSET + tensor_rank)},
    }


def _cuda_state(seed: int) -> torch.Tensor:
    """State of a CUDA generator (aten CUDAGeneratorImpl): the seed, and how many numbers were drawn."""
    return torch.frombuffer(bytearray(struct.pack("<Qq", seed, 0)), dtype=torch.uint8)
