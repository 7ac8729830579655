"""What can be found wrong before any worker starts."""

import os
from collections.abc import Iterator
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder

from neox.checkpoint.conversion.export import check_exportable, lacking_tokenizer
from neox.checkpoint.huggingface import HuggingFaceReader
from neox.checkpoint.meta_llama import MetaLlamaReader
from neox.checkpoint.weights import WeightReader, check_shape, check_vocabulary, missing_tensor
from neox.config import Config
from neox.config.data import OF_FILES
from neox.config.deepspeed import DeepSpeedConfig
from neox.config.idle import idle_keys
from neox.config.resolve_deepspeed import offload_device
from neox.data import build_tokenizer
from neox.data.preflight import check_data, data_remarks, has_tokenizer
from neox.errors import ConfigError
from neox.launch.hosts import has_hostfile
from neox.launch.restarts import times_restarted
from neox.model.build import meta_decoder
from neox.model.head import is_reward_head
from neox.training.deepspeed_settings import check_settings
from neox.training.metrics.services import wants_wandb
from neox.training.objectives.build import check_objective
from neox.training.origin import origin_of
from neox.training.resumption import expected, may_be_restarted
from neox.training.run import agreed_schedule, cuda_device_count, with_iterations
from neox.training.save_folder import check_save, lineage_of, resumed_at
from neox.training.uploads import check_copies, check_store
from neox.training.vocabulary import settle_vocabulary


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
    check_data(config)
    if config.checkpoint.save is not None and config.checkpoint.save_hf:
        check_exportable(config)
    if not times_restarted(os.environ):  # later a store out of reach is no mistake, see `_check_origin`
        check_store(config.checkpoint)
    _check_origin(expected(config, os.environ), is_agreed=not may_be_restarted(config, os.environ))
    return config


def _check_origin(config: Config, *, is_agreed: bool) -> None:
    """Open what the run starts from, and see that it fits, and that `save` has room for what it writes."""
    origin = origin_of(config)
    check_objective(config, origin)
    if origin is not None:
        agreed_schedule(with_iterations(config), origin.run)
        _check_vocabulary(config, origin.weights)
        check_shapes(config, origin.weights)
    if is_agreed and config.training.do_train:
        lineage = lineage_of(config, origin)
        check_save(config, origin, lineage)
        if not times_restarted(os.environ):  # later each upload looks for itself, and warns
            check_copies(config.checkpoint, lineage, start=resumed_at(config, origin))


def remarks(config: Config) -> Iterator[str]:
    """Lines that whoever starts a run should read once, with the configuration's own notices.

    What it starts from is told by the ranks, who agree on it (`neox.training.resumption`).
    """
    yield from config.notices
    yield from idle_keys(config)
    yield from _unreported(config)
    yield from _without_weights(config)
    if config.checkpoint.save is not None and config.checkpoint.save_hf and (lacking := lacking_tokenizer(config)):
        yield f"save_hf: the tokenizer is left out of the folders hf: {lacking}"
    yield from data_remarks(config)
    yield from _missing_tokenizer_files(config)
    if config.evaluation.eval_tasks:
        yield "eval_tasks: not run while training; run evaluate.py with the same files"
    if config.logging.memory_profiling and _is_without_gpu(config):
        yield "memory_profiling: there is no CUDA device here, nothing is recorded"


def _without_weights(config: Config) -> Iterator[str]:
    """What is meant for a model that has been trained, where the run begins from fresh weights."""
    meant = {"lora": config.lora.is_on, f"train_impl {config.preference.train_impl}": config.preference.is_on}
    for name in (name for name, is_on in meant.items() if is_on and config.checkpoint.load is None):
        yield f"{name}: load is not set, so it begins from fresh weights; set it to the model that is to be tuned"


def _unreported(config: Config) -> Iterator[str]:
    """What was to be seen at Weights & Biases, where nothing goes for want of a key."""
    settings = config.logging
    if settings.use_wandb is None and not wants_wandb(None, host=settings.wandb_host, environ=os.environ):
        for key in ("wandb_group", "wandb_team", "wandb_project", "wandb_run_name"):
            if key in config.given:
                yield f"{key} has no effect: use_wandb is not set, and no key for {settings.wandb_host} is found"


def _missing_tokenizer_files(config: Config) -> Iterator[str]:
    """Files that are named and not there, where the size of the vocabulary is known without them."""
    settings = config.tokenizer
    if settings.tokenizer_type not in OF_FILES:
        return
    for key in ("vocab_file", "merge_file"):
        path = getattr(settings, key)
        if path is not None and not Path(path).exists():
            yield f"{key} {path}: no such file; training does not read it, so nothing is checked against the tokenizer"


def _check_device(config: Config) -> None:
    """Refuse what only a GPU can do."""
    zero = config.deepspeed.zero_optimization or {}
    _check_drives(config.deepspeed)
    if _is_without_gpu(config):
        if config.model.precision == "fp16" and not get_accelerator().is_fp16_supported():
            raise ConfigError(
                "precision: fp16 needs a GPU, and there is none here; add fp16.enabled=false precision=bfloat16"
            )
        for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
            if zero.get(key):
                raise ConfigError(f"zero_optimization.{key}: its kernels need CUDA, and there is none here; remove it")


def _check_drives(deepspeed: DeepSpeedConfig) -> None:
    """Refuse offload to a drive where DeepSpeed cannot build the code that reads and writes it."""
    for what in ("optimizer", "param"):
        if offload_device(deepspeed, what) == "nvme" and not AsyncIOBuilder().is_compatible(verbose=False):
            place = f"zero_optimization.offload_{what}.device"
            raise ConfigError(f"{place}: 'nvme' needs DeepSpeed's async_io, which needs libaio; set device: cpu")


def _is_without_gpu(config: Config) -> bool:
    """Whether the run takes place here, and there is no GPU; other hosts are not asked."""
    return cuda_device_count() == 0 and not has_hostfile(config)


def _check_vocabulary(config: Config, weights: WeightReader) -> None:
    """See that the checkpoint has a row for each token, where the tokenizer is at hand; training needs none."""
    if has_tokenizer(config):
        check_vocabulary(weights, build_tokenizer(config.tokenizer).vocab_size)


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
