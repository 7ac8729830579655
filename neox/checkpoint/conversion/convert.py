"""From one format to another: imports as native checkpoints, and the proof that an export computes the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.huggingface import SHARD_BYTES
from neox.checkpoint.native.lineage import check_vacant
from neox.checkpoint.native.manifest import Layout, Manifest, Progress
from neox.checkpoint.native.store import AnnouncedTensor, StoredTensor, Team, divided, write_checkpoint
from neox.checkpoint.storage.ahead import read_ahead
from neox.checkpoint.storage.memory import available_bytes, return_freed
from neox.checkpoint.storage.progress import progress_bar
from neox.checkpoint.weight_map import weight_map
from neox.checkpoint.weights import WeightReader, weight_source
from neox.config import Config, ModelConfig
from neox.errors import CheckpointError
from neox.model.build import DTYPES, build_decoder, in_dtype

CHECK_TOKENS = (2, 32)
"""Sequences and tokens of the comparison."""

MEMORY_FACTOR = 1.25
"""What the comparison takes, in multiples of the model in fp32; the two models are in memory one after the other."""

TOLERANCE = 1e-4
"""Largest difference of logits that rounding explains, relative to the largest logit; both models run in fp32."""


def write_native(weights: WeightReader, config: Config, root: Path, *, max_shard_bytes: int = SHARD_BYTES) -> Path:
    """Write weights as checkpoint 0 of a run: to be fine-tuned, sampled, evaluated, at any layout.

    Args:
        weights: where they come from.
        config: the model; the weights are stored in its precision.
        root: folder of checkpoints; `latest` in it names the new one.
        max_shard_bytes: bound on the size of a file.

    Raises:
        CheckpointError: the weights do not fit the configuration, or there are checkpoints in `root`.
    """
    assert config.model.padded_vocab_size is not None, "the vocabulary is resolved before a model is written"
    check_vacant(root)
    manifest = Manifest(
        progress=Progress(),
        layout=Layout(pipe_parallel_size=1, data_parallel_size=1, model_parallel_size=1, zero_stage=0),
        padded_vocab_size=config.model.padded_vocab_size,
        precision=config.model.precision,
        schedule={},
        optimizer=None,
        config=config.to_flat(),
        files={},
        tensors={},
    )
    announced = announced_tensors(config.model)
    shapes = {tensor.key: tensor.shape for tensor in announced}
    sizes = {tensor.key: tensor.shape.numel() * tensor.dtype.itemsize for tensor in announced}
    read, dtype = weight_source(weights), DTYPES[config.model.precision]

    def tensors() -> Iterator[StoredTensor]:
        for name in progress_bar(shapes, sizes, "writing"):
            return_freed()
            yield StoredTensor("model", name, in_dtype(name, read(name, shapes[name]), dtype).contiguous())

    return write_checkpoint(
        root,
        iteration=0,
        tensors=read_ahead(tensors()),
        manifest=manifest,
        configs=config.files,
        team=Team(),
        file_bytes=max_shard_bytes,
        announced=announced,
    )


def native_files(config: ModelConfig, *, max_shard_bytes: int = SHARD_BYTES) -> dict[str, int]:
    """Bytes of the tensors of each file that `write_native` writes."""
    return {
        f"model-00000-{number:03d}.safetensors": sum(
            shape.numel() * dtype.itemsize for dtype, shape in entries.values()
        )
        for number, (_, entries) in enumerate(divided(announced_tensors(config), max_shard_bytes))
    }


def announced_tensors(config: ModelConfig) -> list[AnnouncedTensor]:
    """The parameters of a model as a checkpoint holds them, in the order of the layers."""
    dtype = DTYPES[config.precision]
    return [AnnouncedTensor("model", name, dtype, tensor.shape) for name, tensor in weight_map(config).items()]


def lacking_memory(config: ModelConfig) -> str:
    """Why `largest_logit_difference` cannot run here, `it takes 30 GB ...`; empty if it can."""
    parameters = sum(tensor.shape.numel() for tensor in weight_map(config).values())
    needed, available = int(parameters * torch.float32.itemsize * MEMORY_FACTOR), available_bytes()
    if available is None or needed <= available:
        return ""
    return f"it takes {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free"


def largest_logit_difference(
    folder: Path, weights: WeightReader, config: ModelConfig, *, dtype: torch.dtype, seed: int = 0
) -> float:
    """Run an export in transformers and its source here, on the same random tokens, both in fp32.

    Args:
        folder: the export.
        weights: its source.
        config: the model.
        dtype: type of the exported weights, to which the source is rounded too.
        seed: for the tokens.

    Raises:
        CheckpointError: transformers is not installed, or the logits differ by more than rounding.
    """
    assert config.padded_vocab_size is not None, "the vocabulary is resolved before a model is exported"
    length = min(CHECK_TOKENS[1], config.seq_length)
    generator = torch.Generator().manual_seed(seed)
    tokens_BS = torch.randint(config.padded_vocab_size, (CHECK_TOKENS[0], length), generator=generator)
    theirs_BSV = _transformers_logits(folder, tokens_BS)
    read = weight_source(weights)
    model = build_decoder(config, source=lambda name, shape: read(name, shape).to(dtype)).eval()
    with torch.no_grad():
        ours_BSV = model(tokens_BS)
    difference = float((ours_BSV - theirs_BSV).abs().max())
    allowed = TOLERANCE * max(1.0, float(ours_BSV.abs().max()))
    if not difference <= allowed:
        raise CheckpointError(
            f"{folder}: transformers computes other logits, the largest difference is {difference:.3g}; "
            "do not use this export, and check that the configuration is the one of the training run"
        )
    return difference


def _transformers_logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """fp32 logits [B, S, V] of the exported model."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            "the check of an export needs transformers: pip install transformers, or pass --no-check"
        ) from None
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    with torch.no_grad(), _without_progress_bars(transformers.utils.logging):
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options).eval()
        return model(tokens_BS).logits


@contextmanager
def _without_progress_bars(settings: Any) -> Iterator[None]:
    """The library shows one each time it loads a model, also where no terminal is."""
    shown = settings.is_progress_bar_enabled()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            settings.enable_progress_bar()
