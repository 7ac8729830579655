"""Rules of the layout: processes, stages, ZeRO and the batch."""

import re

from neox.config.deepspeed import DeepSpeedConfig
from neox.config.elastic_batch import share_batch
from neox.config.keys import mismatch
from neox.config.layouts import find_layout
from neox.config.model import ModelConfig
from neox.config.optimization import BatchConfig
from neox.config.parallel import ParallelConfig
from neox.config.problems import Problems
from neox.config.resolve_deepspeed import offload_device

LAYER_CLASSES = ("Embedding", "TransformerBlock", "FinalNorm", "OutputHead")
"""What `type:` of pipe_partition_method is matched with."""


def resolve_parallel(
    parallel: ParallelConfig,
    model: ModelConfig,
    deepspeed: DeepSpeedConfig,
    *,
    world_size: int | None,
    problems: Problems,
    notices: list[str],
) -> ParallelConfig:
    """Find the data-parallel size and the ZeRO stage that runs, and note what does not divide."""
    _check_divisions(parallel, model, problems)
    _check_stages(parallel, model, problems)
    _check_tied_ends(parallel, model, deepspeed, problems)
    _check_secondary_partition(parallel, deepspeed, world_size, problems)
    if parallel.sequence_parallel and parallel.model_parallel_size == 1:
        notices.append("sequence_parallel has no effect: model_parallel_size is 1")
    return parallel.model_copy(
        update={
            "world_size": world_size,
            "data_parallel_size": _data_parallel_size(parallel, world_size, problems),
            "zero_stage": _zero_stage(parallel, model, deepspeed, problems, notices),
            # With one tensor rank there is nothing to split a sequence over.
            "sequence_parallel": parallel.sequence_parallel and parallel.model_parallel_size > 1,
        }
    )


def _check_divisions(parallel: ParallelConfig, model: ModelConfig, problems: Problems) -> None:
    size = parallel.model_parallel_size
    divided = {"num_attention_heads": model.num_attention_heads}
    if model.is_grouped:
        divided["num_kv_heads"] = model.num_kv_heads
    if parallel.sequence_parallel:
        divided["seq_length"] = model.seq_length
    for name, value in divided.items():
        if value % size:
            problems.add(name, f"{value} is not divisible by model_parallel_size {size}; change one of them")
    width = model.mlp_inner_width
    if width % size:
        gives = f"{model.intermediate_size} gives an inner width of {width}, which"
        what = gives if model.is_gated else f"{width}"
        problems.add("intermediate_size", f"{what} is not divisible by model_parallel_size {size}; change one of them")


def _check_stages(parallel: ParallelConfig, model: ModelConfig, problems: Problems) -> None:
    if parallel.pipeline_stages > model.num_layers:
        problems.add(
            "pipe_parallel_size",
            f"{parallel.pipeline_stages} stages for {model.num_layers} layers; set it to {model.num_layers} or less",
        )
    _check_partition_method(parallel, problems)


def _check_partition_method(parallel: ParallelConfig, problems: Problems) -> None:
    method = parallel.pipe_partition_method
    if not re.fullmatch(r"parameters|uniform|type:.+", method, re.IGNORECASE):
        problems.add("pipe_partition_method", f"{method!r} is unknown; supported: parameters, uniform, type:REGEX")
        return
    kind, _, pattern = method.partition(":")
    try:
        found = any(re.search(pattern, name, re.IGNORECASE) for name in LAYER_CLASSES)
    except re.error as error:
        problems.add("pipe_partition_method", f"{pattern!r} is no regular expression: {error}; mend it")
        return
    if kind.lower() == "type" and not found and parallel.pipeline_stages > 1:
        problems.add("pipe_partition_method", f"{pattern!r} matches no layer; match one of {', '.join(LAYER_CLASSES)}")


def _check_tied_ends(
    parallel: ParallelConfig, model: ModelConfig, deepspeed: DeepSpeedConfig, problems: Problems
) -> None:
    """Refuse where DeepSpeed 0.19.8 loses the sum of the two ends' gradients, and the copies drift apart unseen.

    Its pipeline looks for the gradient in two places, and its ZeRO optimizer with an accumulator of another type
    keeps it in a third.
    """
    if parallel.pipeline_stages < 2 or model.no_weight_tying or model.precision == "fp32":
        return
    accumulates_in = (deepspeed.data_types or {}).get("grad_accum_dtype")
    if model.precision == "bfloat16" and offload_device(deepspeed, "optimizer") != "none":
        problems.add(
            "zero_optimization.offload_optimizer", "breaks a tied embedding in a bf16 pipeline; set no_weight_tying"
        )
    if model.precision == "fp16" and accumulates_in not in (None, "fp16"):
        problems.add("data_types.grad_accum_dtype", "breaks a tied embedding in an fp16 pipeline; remove it")
    if model.precision == "bfloat16" and accumulates_in not in (None, "fp32"):
        problems.add("data_types.grad_accum_dtype", "breaks a tied embedding in a bf16 pipeline; remove it")


def _check_secondary_partition(
    parallel: ParallelConfig, deepspeed: DeepSpeedConfig, world_size: int | None, problems: Problems
) -> None:
    """Refuse ZeRO++'s groups where DeepSpeed 0.19.8 makes them of ranks that hold different tensors."""
    size = (deepspeed.zero_optimization or {}).get("zero_hpz_partition_size", 1)
    key = "zero_optimization.zero_hpz_partition_size"
    if mismatch(size, int) or size == 1:
        return
    if size < 1 or (world_size is not None and world_size % size):
        problems.add(key, f"{size} does not divide {world_size or 'any number of'} processes; set a divisor")
    if parallel.model_parallel_size > 1:
        problems.add(key, f"{size} needs model_parallel_size 1, got {parallel.model_parallel_size}; remove one of them")


def _data_parallel_size(parallel: ParallelConfig, world_size: int | None, problems: Problems) -> int | None:
    if world_size is None:
        return None
    unit = parallel.pipeline_stages * parallel.model_parallel_size
    if world_size < 1 or world_size % unit:
        nearest = max(unit, round(world_size / unit) * unit)
        key = "model_parallel_size" if parallel.model_parallel_size > 1 else "pipe_parallel_size"
        problems.add(
            key,
            f"{world_size} processes cannot be dealt to {parallel.pipeline_stages} pipeline stages x "
            f"{parallel.model_parallel_size} tensor ranks = {unit}; nearest number of processes: {nearest}",
        )
        return None
    return world_size // unit


def _zero_stage(
    parallel: ParallelConfig,
    model: ModelConfig,
    deepspeed: DeepSpeedConfig,
    problems: Problems,
    notices: list[str],
) -> int:
    asked = (deepspeed.zero_optimization or {}).get("stage", 0)
    if asked not in (0, 1, 2, 3) or isinstance(asked, bool):
        problems.add("zero_optimization.stage", f"expected 0, 1, 2 or 3, got {asked!r}")
        return 0
    layout = find_layout(pipeline_stages=parallel.pipeline_stages, zero_stage=int(asked), precision=model.precision)
    if layout.refusal:
        problems.add("zero_optimization.stage", layout.refusal.format(stage=asked))
    if deepspeed.fp32_allreduce and parallel.model_parallel_size > 1 and model.precision != "fp32":
        notices.append(
            f"fp32_allreduce: gradients are reduced in fp32; sums over tensor ranks stay in {model.precision}"
        )
    stage = int(asked) if layout.runs_as is None else layout.runs_as
    if stage != asked:
        notices.append(f"zero_optimization.stage {asked} runs as stage {stage}: {layout.reason}")
    _check_division(deepspeed, stage, problems, notices, in_bf16=model.precision == "bfloat16")
    return stage


def _check_division(
    deepspeed: DeepSpeedConfig, stage: int, problems: Problems, notices: list[str], *, in_bf16: bool
) -> None:
    """Check that DeepSpeed divides gradients as asked at this ZeRO stage, and that it can."""
    extra = deepspeed.deepspeed_extra_args or {}
    key = "gradient_predivide_factor"
    factor = extra.get(key, deepspeed.gradient_predivide_factor)
    if extra.get("prescale_gradients", deepspeed.prescale_gradients):
        if factor != 1.0:
            notices.append(f"{key} has no effect: prescale_gradients divides by the number of ranks before the sum")
        key = "prescale_gradients"
    elif factor == 1.0:
        return
    elif stage == 3:
        # Where it is the number of data ranks DeepSpeed never multiplies by it again.
        problems.add(key, f"{factor} can leave gradients divided by it at ZeRO 3; remove it")
        return
    zero = {**(deepspeed.zero_optimization or {}), **(extra.get("zero_optimization") or {})}
    if (
        stage > 0 and zero.get("reduce_scatter", True) and not (stage == 1 and in_bf16)
    ):  # which has an optimizer of its own
        problems.add(key, f"ZeRO {stage} cannot do it while it scatters; set zero_optimization.reduce_scatter: false")


def resolve_batch(
    batch: BatchConfig, parallel: ParallelConfig, problems: Problems, notices: list[str], *, elastic: bool = False
) -> BatchConfig:
    """Solve batch = micro batch x accumulation steps x data-parallel size for what is not given."""
    ranks = parallel.data_parallel_size
    if elastic and ranks is not None and batch.train_batch_size:
        return share_batch(batch, parallel, problems, notices)
    total, micro = batch.train_batch_size, batch.train_micro_batch_size_per_gpu
    steps = batch.gradient_accumulation_steps
    if not (total and micro):
        # One of the two is open, so nothing else says how many steps to accumulate.
        steps = steps or 1
    if ranks is None or not (total or micro):
        return batch.model_copy(update={"gradient_accumulation_steps": steps})
    unknown = "steps" if not steps else "micro" if not micro else "total" if not total else ""
    unit = (steps or 1) * (micro or 1) * ranks
    total = total or unit
    if total % unit or (not unknown and total != unit):
        problems.add("train_batch_size", _batch_message(total, micro=micro, steps=steps, ranks=ranks))
        return batch
    return batch.model_copy(
        update={
            "train_batch_size": total,
            "train_micro_batch_size_per_gpu": total // unit if unknown == "micro" else micro,
            "gradient_accumulation_steps": total // unit if unknown == "steps" else steps,
        }
    )


def _batch_message(total: int, *, micro: int, steps: int, ranks: int) -> str:
    """Say what the product is (sizes of 0 are not given), and the nearest batch that works."""
    parts = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "data-parallel size": ranks,
    }
    given = {name: value for name, value in parts.items() if value}
    unit = 1
    for value in given.values():
        unit *= value
    product = " x ".join(f"{name} {value}" for name, value in given.items())
    if micro and steps:
        mend = f"set train_batch_size: {unit}"
        if total % (micro * ranks) == 0:
            mend += f", or gradient_accumulation_steps: {total // (micro * ranks)}"
        return f"{total} is not {product} = {unit}; {mend}, or leave one of the three out"
    nearest = max(unit, round(total / unit) * unit)
    return f"{total} is not a multiple of {product} = {unit}; nearest that works: {nearest}"
