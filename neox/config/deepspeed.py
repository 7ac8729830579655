"""What is handed to DeepSpeed as it stands."""

from types import MappingProxyType
from typing import Annotated, Any, Literal

from neox.config.keys import Float, Lower, Section, dead, internal, no_effect, setting

_Mapping = dict[str, Any]


class DeepSpeedConfig(Section):
    """Sections of DeepSpeed's own configuration; absent sections are None."""

    zero_optimization: _Mapping | None = setting(None, "ZeRO: stage, buckets, offload; absent: stage 0.")
    fp16: _Mapping | None = setting(None, "fp16 and its loss scale.", rule="Must say enabled; not together with bf16.")
    bf16: _Mapping | None = setting(None, "bf16.", rule="Must say enabled; not together with fp16.")
    amp: _Mapping | None = setting(
        None,
        "Mixed precision as apex had it: enabled, opt_level O0 (fp32), O1 or O2 (fp16), loss_scale dynamic or a "
        "number, min_loss_scale.",
        rule="Sets precision and the loss scale of fp16; not together with fp16, bf16 or another precision.",
    )
    data_types: _Mapping | None = setting(None, "grad_accum_dtype: type that gradients are summed in.")
    communication_data_type: Annotated[Literal["fp32", "fp16", "bf16"], Lower] | None = setting(
        None,
        "Type that gradients are reduced in; absent: fp32 for bf16, else the model's.",
        rule="Wins over fp32_allreduce.",
    )
    fp32_allreduce: bool = setting(
        False, "Reduce gradients in fp32.", rule="Covers gradients; sums over tensor ranks stay in the model's type."
    )
    prescale_gradients: bool = setting(
        False,
        "Divide gradients by the number of ranks before they are summed, not after.",
        rule="At ZeRO 1 to 3 needs zero_optimization.reduce_scatter: false.",
    )
    gradient_predivide_factor: Float = setting(
        1.0,
        "Divide gradients by this before they are summed, and by the rest of the number of ranks after.",
        gt=0,
        rule="Not used with prescale_gradients. At ZeRO 1 and 2 needs zero_optimization.reduce_scatter: false; at ZeRO "
        "3 it is 1.",
    )
    dump_state: bool = setting(False, "Print DeepSpeed's state at the start.")
    flops_profiler: _Mapping | None = setting(None, "DeepSpeed's profiler of operations.")
    comms_logger: _Mapping | None = setting(None, "DeepSpeed's log of communication.")
    tensorboard: _Mapping | None = setting(None, "DeepSpeed's TensorBoard monitor.")
    wandb: _Mapping | None = setting(None, "DeepSpeed's Weights & Biases monitor.")
    csv_monitor: _Mapping | None = setting(None, "DeepSpeed's CSV monitor.")
    deepspeed_extra_args: _Mapping | None = setting(
        None, "Any further keys of DeepSpeed's configuration.", rule="Merged last; may not contradict another key."
    )


OTHER_KEYS = (
    no_effect("deepspeed", Literal[True], True, "DeepSpeed is always the engine."),
    internal("curriculum_seqlen", int, "Current length of the curriculum.", instead="leave it out"),
    no_effect("sparse_gradients", bool, False, "Reduce only the rows of the embedding's gradient that are not zero."),
    no_effect(
        "activation_checkpointing", dict, None, "DeepSpeed's recomputation; checkpoint_activations and its kin do it."
    ),
    no_effect("checkpoint", dict, None, "DeepSpeed's checkpoints; ours load at any layout, and need none of it."),
    dead("data_efficiency", dict, None, "DeepSpeed's sampler and token dropping, which ask for its own data loader."),
    dead("compression_training", dict, None, "DeepSpeed's compression, which asks for a call that is never made."),
)

ZERO_KEYS = frozenset(
    [
        "stage",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "compute_grad_norm",
        "load_from_fp32_weights",
        "elastic_checkpoint",
        "offload_param",
        "offload_optimizer",
        "zenflow",
        "sub_group_size",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "cpu_offload",
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "model_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
        "gather_16bit_weights_on_model_save",
        "module_granularity_threshold",
        "use_all_reduce_for_fetch_params",
        "allgather_sequential",
        "stage3_gather_fp16_weights_on_model_save",
        "ignore_unused_parameters",
        "legacy_stage1",
        "round_robin_gradients",
        "parameter_alignment",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "memory_efficient_linear",
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory",
        "leaf_module",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
    ]
)
"""Keys of DeepSpeed's zero_optimization, so that a misspelt one is found before anything starts."""

FP16_KEYS = frozenset(
    [
        "enabled",
        "auto_cast",
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
        "fp16_master_weights_and_grads",
    ]
)
BF16_KEYS = frozenset(
    [
        "enabled",
        "immediate_grad_update",
        "check_grad_overflow",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    ]
)
LEFTOVERS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "fp16": {"fp16": bool, "type": str},
        "bf16": {
            "bf16": bool,
            "type": str,
            "loss_scale": float,
            "initial_scale_power": int,
            "loss_scale_window": int,
            "hysteresis": int,
            "min_loss_scale": int,
        },
    }
)
"""Keys that upstream's files carry inside fp16 and bf16 and that DeepSpeed refuses: announced and left out."""

_DEVICE = Literal["none", "cpu", "nvme"]
_DTYPE = Literal["fp32", "fp16", "bf16"]
_ZERO_MAPPINGS = frozenset({"offload_param", "offload_optimizer", "zenflow", "leaf_module"})
_ZERO_NUMBERS = frozenset(
    key for key in ZERO_KEYS if key.endswith(("size", "threshold", "live_parameters", "distance"))
)

SECTIONS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "zero_optimization": {
            key: dict if key in _ZERO_MAPPINGS else int if key in _ZERO_NUMBERS else bool
            for key in ZERO_KEYS - {"stage"}
        }
        | {"stage": Any},
        "zero_optimization.offload_optimizer": {
            "device": _DEVICE,
            "nvme_path": str,
            "buffer_count": int,
            "pin_memory": bool,
            "pipeline_read": bool,
            "pipeline_write": bool,
            "fast_init": bool,
            "ratio": float,
            "super_offload": bool,
            "cpuadam_cores_perc": float,
        },
        "zero_optimization.offload_param": {
            "device": _DEVICE,
            "nvme_path": str,
            "buffer_count": int,
            "buffer_size": int,
            "max_in_cpu": int,
            "pin_memory": bool,
        },
        "fp16": dict.fromkeys(FP16_KEYS, bool)
        | {"loss_scale": float}
        | dict.fromkeys(("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"), int)
        | LEFTOVERS["fp16"],
        "bf16": dict.fromkeys(BF16_KEYS, bool) | LEFTOVERS["bf16"],
        "data_types": {"grad_accum_dtype": _DTYPE},
        "flops_profiler": {
            "enabled": bool,
            "recompute_fwd_factor": float,
            "profile_step": int,
            "module_depth": int,
            "top_modules": int,
            "detailed": bool,
            "output_file": str,
        },
        "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
        "tensorboard": {"enabled": bool, "output_path": str, "job_name": str},
        "wandb": {"enabled": bool, "group": str, "team": str, "project": str},
        "csv_monitor": {"enabled": bool, "output_path": str, "job_name": str},
    }
)
"""Keys of every section that is handed on, by its dotted place, with the types of their values."""

ABOVE_ZERO = frozenset({"reduce_bucket_size", "loss_scale_window"})
MOST: MappingProxyType[str, int] = MappingProxyType({"initial_scale_power": 127})  # 2**128 is infinite in fp32
AT_MOST_ONE = frozenset({"ratio", "cpuadam_cores_perc"})
ANY_SIGN = frozenset({"module_depth"})
"""Numbers inside the sections with bounds of their own; the others are at least 0."""

RETIRED_OFFLOAD: MappingProxyType[str, str] = MappingProxyType(
    {"offload_optimizer": "cpu_offload", "offload_param": "cpu_offload_param"}
)
"""Names inside zero_optimization that DeepSpeed has retired, still found in upstream's files."""

EXTRA_KEYS = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "checkpoint",
        "comet",
        "compile",
        "data_parallel_size",
        "dataloader_drop_last",
        "datastates_ckpt",
        "disable_allgather",
        "disable_python_gc",
        "expert_parallel",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "hybrid_engine",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "pipeline",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "steps_per_print",
        "tensor_parallel",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    ]
    + [name for name in DeepSpeedConfig.model_fields if name not in ("amp", "fp32_allreduce", "deepspeed_extra_args")]
)
"""Keys that deepspeed_extra_args may have: what DeepSpeed reads, and ignores when it is misspelt."""

OWN_KEYS = frozenset(
    {"optimizer", "scheduler", "amp", "elasticity", "data_efficiency", "compression_training", "curriculum_learning"}
)
"""Keys of DeepSpeed that are ours too and are not handed on: inside, DeepSpeed would read them for nothing."""
