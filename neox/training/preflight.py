"""What can be found wrong before any worker starts."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder

from neox.checkpoint.conversion.export import check_exportable
from neox.checkpoint.huggingface import HuggingFaceReader
from neox.checkpoint.meta_llama import MetaLlamaReader
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.weights import WeightReader, check_shape, check_vocabulary, missing_tensor
from neox.config import Config
from neox.config.data import SPLITS
from neox.data import build_tokenizer, padded_vocab_size
from neox.data.completions import completion_sources
from neox.data.indexed import IndexedDataset
from neox.errors import ConfigError
from neox.launch.hosts import has_hostfile
from neox.model.build import meta_decoder
from neox.model.head import is_reward_head
from neox.patience import Patience
from neox.training.deepspeed_settings import check_settings
from neox.training.objectives.build import check_objective
from neox.training.origin import load_folder, origin_of
from neox.training.resumption import expected
from neox.training.run import agreed_schedule, cuda_device_count, with_iterations
from neox.training.uploads import check_store


def prepare(config: Config) -> Config:
    """Resolve what depends on files, and check that the run can start.

    Returns:
        The configuration with its vocabulary settled.

    Raises:
        UserError: a file is missing or damaged, or a checkpoint does not fit the model.
    """
    if not config.optimizer.is_given:
        raise ConfigError('optimizer: missing; training needs one, {"type": "Adam", "params": {"lr": 6.0e-4}} say')
    _check_device(config)
    if config.parallel.world_size is not None:
        check_settings(config)
    config = settle_vocabulary(config)
    _open_data(config)
    if config.checkpoint.save is not None and config.checkpoint.save_hf:
        check_exportable(config)
    check_store(config.checkpoint)
    _check_origin(expected(config, os.environ))
    return config


def _check_origin(config: Config) -> None:
    """Open what the run starts from, and see that it fits."""
    origin = origin_of(config)
    check_objective(config, origin)
    if origin is not None:
        agreed_schedule(with_iterations(config), origin.run)
        _check_vocabulary(config, origin.weights)
        check_shapes(config, origin.weights)


def remarks(config: Config) -> Iterator[str]:
    """Lines that whoever starts a run should read once, with the configuration's own notices.

    What it starts from is told by the ranks, who agree on it (`neox.training.resumption`).
    """
    yield from config.notices
    if config.launch.hostfile is not None and not has_hostfile(config):
        yield f"hostfile {config.launch.hostfile}: no such file, starting on this machine alone"
    if config.evaluation.eval_tasks:
        yield "eval_tasks: not run while training; run evaluate.py with the same files"
    if config.logging.memory_profiling and _is_without_gpu(config):
        yield "memory_profiling: there is no CUDA device here, nothing is recorded"


def _check_device(config: Config) -> None:
    """Refuse what only a GPU can do."""
    zero = config.deepspeed.zero_optimization or {}
    _check_drives(zero)
    if _is_without_gpu(config):
        if config.model.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError(
                "precision: fp16 needs a GPU, and there is none here; add fp16.enabled=false precision=bfloat16"
            )
        for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
            if zero.get(key):
                raise ConfigError(f"zero_optimization.{key}: its kernels need CUDA, and there is none here; remove it")


def _check_drives(zero: dict[str, Any]) -> None:
    """Refuse offload to a drive where DeepSpeed cannot build the code that reads and writes it."""
    for key in ("offload_optimizer", "offload_param"):
        if (zero.get(key) or {}).get("device") == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
            place = f"zero_optimization.{key}.device"
            raise ConfigError(f"{place}: 'nvme' needs DeepSpeed's async_io, which needs libaio; set device: cpu")


def _is_without_gpu(config: Config) -> bool:
    """Whether the run takes place here, and there is no GPU; other hosts are not asked."""
    return cuda_device_count() == 0 and not has_hostfile(config)


def settle_vocabulary(config: Config) -> Config:
    """Fix the softmax's size: the configuration's, the checkpoint's, or the tokenizer's padded as upstream does."""
    if config.model.padded_vocab_size is not None:
        return config
    folder = load_folder(expected(config, os.environ))
    if folder is not None:
        return config.with_vocabulary(open_checkpoint(folder).padded_vocab_size)
    tokenizer = build_tokenizer(config.tokenizer)
    return config.with_vocabulary(
        padded_vocab_size(
            tokenizer.vocab_size,
            divisible_by=config.model.make_vocab_size_divisible_by,
            model_parallel_size=config.parallel.model_parallel_size,
        )
    )


def _check_vocabulary(config: Config, weights: WeightReader) -> None:
    """See that the checkpoint has a row for each token, where the tokenizer is at hand; training needs none."""
    settings = config.tokenizer
    has_file = settings.vocab_file is not None and Path(settings.vocab_file).is_file()
    if has_file or settings.tokenizer_type == "CharLevelTokenizer":
        check_vocabulary(weights, build_tokenizer(config.tokenizer).vocab_size)


def _open_data(config: Config) -> None:
    """Open every file of the data, which checks them."""
    data = config.data
    paths = [getattr(data, f"{split}{kind}_data_paths") for split in SPLITS for kind in ("", "_label")]
    for prefix in [data.data_path, *(path for given in paths for path in given or ())]:
        if prefix:
            IndexedDataset(prefix, data_impl=data.data_impl, patience=Patience(config.reliability.retry_time))
    for split in SPLITS if config.preference.is_on and config.comparison.dataset_impl != "online" else ():
        completion_sources(config, split)
    if config.data.eod_mask_loss or config.data.document_masking or config.training.char_level_ppl:
        build_tokenizer(config.tokenizer)


def check_shapes(config: Config, weights: WeightReader) -> None:
    """Compare every parameter of the model with the checkpoint's, without reading a tensor.

    Raises:
        CheckpointError: naming the first that differs, with both shapes.
    """
    if isinstance(weights, HuggingFaceReader | MetaLlamaReader):
        weights.check_files()  # its shapes are those that a description promises
    shapes = weights.shapes()
    for name, parameter in meta_decoder(config.model).named_parameters():
        if name not in shapes and is_reward_head(name):
            continue  # it starts anew
        if name not in shapes:
            raise missing_tensor(weights.folder, name)
        check_shape(weights.folder, name, shapes[name], parameter.shape)
