"""The batch, the optimizer and the learning rate."""

from typing import Annotated, Any, Literal

from neox.config.keys import Float, Int, Ints, Lower, Section, dead, derived, internal, setting

OptimizerName = Literal[
    "adam",
    "adamw",
    "sgd",
    "lion",
    "sm3",
    "madgrad_wd",
    "adam8bit",
    "muon",
    "cpu_adam",
    "cpu_torch_adam",
]


_ONE_BIT = (
    "is gone from DeepSpeed; set type: Adam, and to send fewer bytes zero_optimization: {stage: 3, "
    "zero_quantized_gradients: true} (ZeRO++) or communication_data_type: bf16"
)


class BatchConfig(Section):
    """train_batch_size = micro batch x accumulation steps x data-parallel size; 0 while not known."""

    train_batch_size: Int = setting(
        0,
        "Sequences of one optimizer step.",
        gt=0,
        rule="train_micro_batch_size_per_gpu x gradient_accumulation_steps x data-parallel size.",
    )
    train_micro_batch_size_per_gpu: Int = setting(
        0, "Sequences of one forward pass on one process.", gt=0, rule="Absent: train_batch_size over the other two."
    )
    gradient_accumulation_steps: Int = setting(
        0,
        "Forward passes of one optimizer step; absent: whatever the other two imply, or 1.",
        gt=0,
        rule="Absent: train_batch_size over the other two.",
    )
    elasticity: dict[str, Any] | None = setting(
        None,
        "Batch for a changing number of processes: enabled, max_train_batch_size, micro_batch_sizes, min_gpus, "
        "max_gpus, prefer_larger_batch, version 0.1 (counts processes) or 0.2 (whole hosts of num_gpus_per_node).",
        rule="Sets train_batch_size and the other two, which may then not be set, unless "
        "ignore_non_elastic_batch_info says so.",
    )
    rampup_batch_size: Ints | None = setting(
        None,
        "Growing batch: sequences of the first step, increment, and consumed samples after which train_batch_size is "
        "reached.",
        rule="Increments are spread over the samples evenly; each size is a multiple of micro batch x data-parallel "
        "size; train_iters and the learning rate count steps of whatever size.",
    )


class OptimizerConfig(Section):
    """The rule that updates parameters."""

    type: Annotated[OptimizerName, Lower] = setting(
        "adam",
        "Rule of the update. Adam and AdamW are one and the same: decoupled weight decay. cpu_adam and "
        "cpu_torch_adam are AdamW on the CPU and need zero_optimization.offload_optimizer.",
        key="optimizer.type",
        retired=dict.fromkeys(("onebitadam", "onebitlamb", "zerooneadam"), _ONE_BIT),
    )
    params: dict[str, Any] = setting(
        {},
        "Arguments of the optimizer: lr, weight_decay, and by type betas, eps, momentum, beta, nesterov, ns_steps, "
        "adjust_lr_fn, adamw_lr.",
        key="optimizer.params",
    )
    use_bnb_optimizer: bool = setting(
        False, "Adam with 8-bit moments, from bitsandbytes; the same as optimizer.type: Adam8bit."
    )
    lr: float = derived(0.0, "Peak learning rate, from optimizer.params.lr; 0 when no optimizer is given.")
    is_given: bool = derived(False, "Whether the configuration names an optimizer at all.")
    weight_decay: Float = setting(
        0.1,
        "Weight decay of matrices; norms and biases have none.",
        ge=0,
        rule="The same as optimizer.params.weight_decay; both only when equal.",
    )
    gradient_clipping: Float = setting(1.0, "Largest global L2 norm of the gradients; 0 does not clip.", ge=0)


DecayStyle = Literal["constant", "linear", "cosine", "exponential", "inverse_sqrt", "wsd"]


class ScheduleConfig(Section):
    """The learning rate over the iterations."""

    lr_decay_style: Annotated[DecayStyle, Lower] = setting(
        "linear", "Shape of the decay after warmup; wsd is warmup, a constant rate, then a short decay."
    )
    wsd_decay_fraction: Float = setting(0.1, "Share of lr_decay_iters that is the decay of wsd.", gt=0, le=1)
    wsd_decay_shape: Annotated[Literal["linear", "cosine", "1-sqrt"], Lower] = setting(
        "1-sqrt", "Curve of the decay of wsd, from the peak to min_lr."
    )
    lr_decay_iters: Int = setting(
        0,
        "Iteration where min_lr is reached; absent: lr_decay_fraction x train_iters, or train_iters.",
        gt=0,
        rule="Wins over lr_decay_fraction.",
    )
    lr_decay_fraction: Float | None = setting(
        None,
        "Iteration where min_lr is reached, over train_iters.",
        gt=0,
        le=1,
        rule="Used when lr_decay_iters is absent.",
    )
    min_lr: Float = setting(0.0, "Floor of the learning rate.", ge=0, rule="At most optimizer.params.lr.")
    warmup: Float = setting(0.01, "Share of lr_decay_iters that is linear warmup, 0 to 1.", ge=0, le=1)
    scheduler: dict[str, Any] | None = setting(
        None,
        "A schedule of DeepSpeed's in place of ours: type WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle or "
        "LRRangeTest, and its params.",
        rule="Wins over lr_decay_style, min_lr, warmup and the rest; OneCycle moves the optimizer's betas too.",
    )
    override_lr_scheduler: bool = setting(
        False,
        "When loading, take this schedule and not the saved one.",
        rule="Not together with use_checkpoint_lr_scheduler; with neither, saved and configured values must agree.",
    )
    use_checkpoint_lr_scheduler: bool = setting(
        False,
        "When loading, take the saved schedule and not this one.",
        rule="Not together with override_lr_scheduler.",
    )


_ZERO = "set it inside zero_optimization"

OTHER_KEYS = (
    internal("batch_size", int, "Micro batch.", instead="set train_micro_batch_size_per_gpu"),
    internal("optimizer_type", str, "Name of the optimizer.", instead="set optimizer.type"),
    internal("lr", float, "Peak learning rate.", instead="set optimizer.params.lr"),
    internal("clip_grad", float, "Largest gradient norm.", instead="set gradient_clipping"),
    internal("zero_stage", int, "ZeRO stage.", instead="set zero_optimization.stage"),
    internal("zero_reduce_scatter", bool, "ZeRO's reduce_scatter.", instead=_ZERO),
    internal("zero_contiguous_gradients", bool, "ZeRO's contiguous_gradients.", instead=_ZERO),
    internal("zero_reduce_bucket_size", int, "ZeRO's reduce_bucket_size.", instead=_ZERO),
    internal("zero_allgather_bucket_size", int, "ZeRO's allgather_bucket_size.", instead=_ZERO),
    internal(
        "dynamic_loss_scale",
        bool,
        "Whether the loss scale moves.",
        instead="set fp16.loss_scale (0 is dynamic)",
    ),
    internal("loss_scale", float, "Static loss scale.", instead="set fp16.loss_scale"),
    dead("hysteresis", int, 2, "Patience of the loss scale; fp16.hysteresis is the one that works."),
    dead(
        "loss_scale_window",
        float,
        1000.0,
        "Window of the loss scale; fp16.loss_scale_window is the one that works.",
    ),
    dead("min_scale", float, 1.0, "Smallest loss scale; fp16.min_loss_scale is the one that works."),
)
