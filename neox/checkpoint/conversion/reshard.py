"""From any format to GPT-NeoX's layouts and to ours."""

from dataclasses import dataclass
from pathlib import Path

from neox.checkpoint.conversion.convert import native_files, write_native
from neox.checkpoint.lora import MergedWeights
from neox.checkpoint.native.manifest import Progress
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.upstream.write import UpstreamLayout, UpstreamWriter
from neox.checkpoint.weights import WeightReader
from neox.config import Config, config_from_dict
from neox.errors import CheckpointError, ConfigError

PRECISIONS = {"fp16": "fp16", "bf16": "bfloat16", "fp32": "fp32"}


@dataclass(frozen=True)
class Target:
    """What is to be written.

    Attributes:
        format: one of `neox.choices.FORMATS`.
        pipe: stages of the pipeline format; None for one.
        tensor: tensor-parallel size.
        legacy: GPT-NeoX's names of before 2024-09.
        precision: one of PRECISIONS; None for the run's.
    """

    format: str
    pipe: int | None = None
    tensor: int = 1
    legacy: bool = False
    precision: str | None = None


def reshard(
    weights: WeightReader, config: Config, root: Path, *, target: Target, progress: Progress, dry_run: bool = False
) -> tuple[Path, dict[str, int]]:
    """Write a checkpoint's weights in another form; one tensor is in memory at a time.

    Args:
        weights: the source.
        config: of its run, the vocabulary settled.
        root: folder of checkpoints; `latest` in it names the new one.
        target: the form.
        progress: of the run, for GPT-NeoX to go on counting.
        dry_run: write nothing.

    Returns:
        The folder, and the bytes of weights in each file.

    Raises:
        CheckpointError: it cannot be written in that form, or need not be.
        ConfigError: the sizes do not fit each other or the model.
    """
    _check_sizes(target)
    precision = PRECISIONS[target.precision] if target.precision else config.model.precision
    if target.format == "native":
        if isinstance(weights, NativeReader) and precision == weights.manifest.precision:
            raise CheckpointError(
                f"{weights.folder}: is in our own format, which every layout loads as it is; give another --format, "
                "or a --precision to change"
            )
        config = _in_precision(config, precision, lora=isinstance(weights, MergedWeights))
        files = native_files(config.model)
        return (root / "global_step0" if dry_run else write_native(weights, config, root)), files
    pipe = 0 if target.format == "sequential" else target.pipe or 1
    writer = UpstreamWriter(
        weights,
        _in_precision(config, precision, lora=isinstance(weights, MergedWeights)),
        layout=UpstreamLayout(pipe=pipe, tensor=target.tensor, legacy=target.legacy),
        iteration=progress.iteration,
        samples=progress.consumed_samples,
    )
    return (root / f"global_step{progress.iteration}" if dry_run else writer.write(root)), writer.files()


def _check_sizes(target: Target) -> None:
    if target.tensor < 1 or (target.pipe is not None and target.pipe < 1):
        raise ConfigError("--model_parallel_size, --pipe_parallel_size: must be at least 1")
    if target.pipe is not None and target.format != "pipeline":
        raise ConfigError(f"--pipe_parallel_size: the {target.format} format has no stages; leave it out")
    if target.format == "native" and (target.tensor > 1 or target.legacy):
        raise ConfigError("--format native: holds whole tensors under one set of names; leave sizes and names out")


def _in_precision(config: Config, precision: str, *, lora: bool) -> Config:
    """The configuration for weights of another type, and without factors that were merged."""
    keys = {key: value for key, value in config.to_flat().items() if key not in ("fp16", "bf16")}
    if lora:
        keys["lora"] = None
    if precision == config.model.precision and not lora:
        return config
    return config_from_dict(keys | {"precision": precision}, world_size=None).with_vocabulary(
        config.model.padded_vocab_size or 0
    )
