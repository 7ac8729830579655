"""Recomputing activations in the backward pass (Chen et al. 2016), and where the inputs wait until then."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from neox.config import Config


def segment_length(config: Config) -> int:
    """Layers of one recomputed segment; 0 where nothing is recomputed."""
    return config.training.checkpoint_num_layers if config.training.checkpoint_activations else 0


def segment_runner(config: Config) -> Callable[..., Any]:
    """What runs a segment, called with a function and its inputs, so that only the inputs are kept.

    With `checkpoint_in_cpu` they are kept in the memory of the host.
    """
    run = partial(checkpoint, use_reentrant=False)
    return partial(_with_inputs_on_host, run) if config.training.checkpoint_in_cpu else run


def _with_inputs_on_host(run: Callable[..., Any], *arguments: Any) -> Any:
    # What is saved inside the segment is dropped by the hooks of `checkpoint`; its inputs come here.
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return run(*arguments)
