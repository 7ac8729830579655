"""Imported by the fork server before any rank exists: no import and no warm-up is left for the ranks."""

import gc
import importlib
import pkgutil

import hypothesis  # noqa: F401
import megatron.core.tensor_parallel  # noqa: F401
import pytest  # noqa: F401
import tokenizers.implementations  # noqa: F401
import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed
import torch.profiler._cupti_monitor
import transformers  # noqa: F401
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401

import neox

for module in pkgutil.walk_packages(neox.__path__, "neox."):
    if not module.name.endswith(("__main__", "adam8bit")):  # bitsandbytes prints what it cannot do
        importlib.import_module(module.name)

DeepSpeedConfig({"train_batch_size": 1})  # imports more
torch.set_num_threads(1)
gc.collect()
gc.freeze()  # a collection in a rank would write to, and so copy, every page of what is imported here
