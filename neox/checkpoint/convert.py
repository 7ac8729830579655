"""From one format to another: imports as native checkpoints, and the proof that an export computes the same."""

from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.huggingface import SHARD_BYTES
from neox.checkpoint.manifest import Layout, Manifest, Progress
from neox.checkpoint.native import StoredTensor, Team, write_checkpoint
from neox.checkpoint.weights import WeightReader, weight_source
from neox.config import Config, ModelConfig
from neox.errors import CheckpointError
from neox.model.build import DTYPES, build_decoder, meta_decoder

CHECK_TOKENS = (2, 32)
"""Sequences and tokens of the comparison."""

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
        CheckpointError: the weights do not fit the configuration.
    """
    assert config.model.padded_vocab_size is not None, "the vocabulary is resolved before a model is written"
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
    dtype = DTYPES[config.model.precision]
    read = weight_source(weights)
    tensors = (
        StoredTensor("model", name, read(name, parameter.shape).to(dtype).contiguous())
        for name, parameter in meta_decoder(config.model).named_parameters()
    )
    return write_checkpoint(
        root,
        iteration=0,
        tensors=tensors,
        manifest=manifest,
        configs=config.files,
        team=Team(),
        file_bytes=max_shard_bytes,
    )


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
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options).eval()
        return model(tokens_BS).logits
