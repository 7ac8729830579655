"""The configuration that DeepSpeed gets."""

from typing import Any

import pytest
from config.config_samples import sample

from neox.config import config_from_dict, deepspeed_dict
from neox.config.deepspeed import BF16_KEYS, FP16_KEYS, SECTIONS, ZERO_KEYS
from neox.errors import ConfigError


def engine(world_size: int = 1, **changes: Any) -> dict[str, Any]:
    return deepspeed_dict(config_from_dict(sample(**changes), world_size=world_size))


def test_whole_dictionary_of_a_plain_run() -> None:
    assert engine(world_size=2) == {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {"stage": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
    }


@pytest.mark.parametrize("clipping", [None, 0.0, 0.5, 1.0])
def test_clipping_is_never_dropped(clipping: float | None) -> None:
    assert engine(gradient_clipping=clipping)["gradient_clipping"] == (1.0 if clipping is None else clipping)


def test_values_equal_to_defaults_are_passed_on() -> None:
    given = engine(prescale_gradients=False, gradient_predivide_factor=1, dump_state=False)
    assert given["prescale_gradients"] is False
    assert given["gradient_predivide_factor"] == 1.0
    assert given["dump_state"] is False
    assert "prescale_gradients" not in engine()


def test_bf16_sums_and_reduces_in_fp32_unless_told_otherwise() -> None:
    plain = engine(bf16={"enabled": True})
    assert plain["bf16"] == {"enabled": True}
    assert plain["data_types"] == {"grad_accum_dtype": "fp32"}
    assert plain["communication_data_type"] == "fp32"
    assert plain["zero_optimization"] == {"stage": 1}
    told = engine(precision="bf16", data_types={"grad_accum_dtype": "bf16"}, communication_data_type="bf16")
    assert told["data_types"] == {"grad_accum_dtype": "bf16"}
    assert told["communication_data_type"] == "bf16"


def test_fp16_of_upstream_files() -> None:
    section = {"fp16": True, "enabled": True, "type": "fp16", "loss_scale": 0, "initial_scale_power": 12}
    given = engine(fp16=section)
    assert given["fp16"] == {"enabled": True, "loss_scale": 0, "initial_scale_power": 12}
    assert "data_types" not in given
    assert "communication_data_type" not in given


def test_zero_keeps_buckets_and_replaces_retired_names() -> None:
    zero = {"stage": 2, "reduce_bucket_size": 500000000, "overlap_comm": True, "cpu_offload": False}
    assert engine(zero_optimization=zero)["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 500000000,
        "overlap_comm": True,
    }
    offload = engine(zero_optimization={"stage": 2, "cpu_offload": True})
    assert offload["zero_optimization"] == {"stage": 2, "offload_optimizer": {"device": "cpu"}}


def test_sections_are_passed_on() -> None:
    profiler = {"enabled": True, "profile_step": 3}
    assert engine(flops_profiler=profiler, comms_logger={"enabled": False})["flops_profiler"] == profiler
    assert engine(fp32_allreduce=True)["communication_data_type"] == "fp32"
    config = config_from_dict(sample(fp32_allreduce=True, model_parallel_size=2, precision="bfloat16"), world_size=2)
    assert "fp32_allreduce: gradients are reduced in fp32; sums over tensor ranks stay in bfloat16" in config.notices


def test_extra_arguments_merge_and_may_not_contradict() -> None:
    extra = {"zero_optimization": {"overlap_comm": True}, "seq_parallel_communication_data_type": "bf16"}
    given = engine(deepspeed_extra_args=extra)
    assert given["zero_optimization"] == {"stage": 0, "overlap_comm": True}
    assert given["seq_parallel_communication_data_type"] == "bf16"
    with pytest.raises(ConfigError) as error:
        engine(deepspeed_extra_args={"zero_optimization": {"stage": 3}, "gradient_clipping": 2.0})
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "deepspeed_extra_args.zero_optimization.stage",
        "deepspeed_extra_args.gradient_clipping",
    ]


def test_dictionary_is_the_callers() -> None:
    config = config_from_dict(sample(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}))
    deepspeed_dict(config)["zero_optimization"]["offload_optimizer"]["device"] = "nvme"
    assert deepspeed_dict(config)["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_world_size_must_be_known() -> None:
    with pytest.raises(ConfigError, match="train_batch_size: not known before the number of processes"):
        deepspeed_dict(config_from_dict(sample(), world_size=None))


def test_a_log_of_communication_that_is_off_is_not_there() -> None:
    # DeepSpeed takes the section's presence for a wish.
    assert "comms_logger" not in engine(comms_logger={"enabled": False, "verbose": True})
    assert engine(comms_logger={"enabled": True})["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"comms_logger": {"enable": True}}, "comms_logger.enable: unknown key; did you mean 'enabled'?"),
        ({"csv_monitor": {"enabled": "yes"}}, "csv_monitor.enabled: expected true or false, got 'yes'"),
        (
            {"flops_profiler": {"enabled": True, "profil_step": 3}},
            "flops_profiler.profil_step: unknown key; did you mean 'profile_step'?",
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}},
            "zero_optimization.reduce_bucket_size: expected an integer, got 'big'",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "gpu"}}},
            "zero_optimization.offload_optimizer.device: expected 'none' or 'cpu' or 'nvme', got 'gpu'",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}},
            "zero_optimization.offload_param.devise: unknown key; did you mean 'device'?",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param: needs stage 3, got 2; set stage: 3, or remove it",
        ),
        (
            {"zero_optimization": {"cpu_offload": True}},
            "zero_optimization.cpu_offload: needs stage 1, 2 or 3, got 0; set stage: 1, or remove it",
        ),
        (
            {"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_gradients: needs stage 3, got 2; set stage: 3, or remove it",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}},
            "zero_optimization.zero_hpz_partition_size: 3 does not divide 2 processes; set a divisor",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}, "model_parallel_size": 2},
            "zero_optimization.zero_hpz_partition_size: 2 needs model_parallel_size 1, got 2; remove one of them",
        ),
        ({"data_types": {"grad_accum_dtype": "int8"}}, "data_types.grad_accum_dtype: expected 'fp32' or 'fp16' or"),
        (
            {"deepspeed_extra_args": {"ssh_port": 22}},
            "deepspeed_extra_args.ssh_port: is no setting of the engine; give",
        ),
        (
            {"deepspeed_extra_args": {"gradient_allreduceop": "sum"}},
            "deepspeed_extra_args.gradient_allreduceop: DeepSpeed knows no such key; did you mean",
        ),
        (
            {"deepspeed_extra_args": {"scheduler": {"type": "WarmupLR"}}},
            "deepspeed_extra_args.scheduler: is a key of its own; set scheduler beside deepspeed_extra_args",
        ),
        ({"autotuning_run": "tune"}, "autotuning_run: 'tune' is not supported yet (DeepSpeed's autotuner; compare"),
        ({"profile": True, "profile_step_stop": 10}, "profile_step_stop: 10 is not after profile_step_start 10"),
    ],
)
def test_mistakes_in_the_sections_are_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(sample(**changes), world_size=2)
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)


def test_what_changes_no_result_is_accepted_with_one_line_each() -> None:
    changes = {
        "activation_checkpointing": {"partition_activations": True},
        "checkpoint": {"load_universal": True},
        "sparse_gradients": True,
        "profile_backward": True,
    }
    config = config_from_dict(sample(**changes))
    assert [notice.partition(" ")[0] for notice in config.notices] == list(changes)
    assert not changes.keys() & deepspeed_dict(config).keys()
    assert not config_from_dict(sample(sparse_gradients=False, checkpoint={}, autotuning={"enabled": False})).notices


def test_names_match_the_installed_deepspeed() -> None:
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    offload = pytest.importorskip("deepspeed.runtime.zero.offload_config")
    comm = pytest.importorskip("deepspeed.comm.config")
    monitor = pytest.importorskip("deepspeed.monitor.config")
    for model, known in (
        (zero.DeepSpeedZeroConfig, ZERO_KEYS),
        (precision.DeepSpeedFP16Config, FP16_KEYS),
        (precision.DeepSpeedBF16Config, BF16_KEYS),
        (offload.DeepSpeedZeroOffloadOptimizerConfig, SECTIONS["zero_optimization.offload_optimizer"].keys()),
        (offload.DeepSpeedZeroOffloadParamConfig, SECTIONS["zero_optimization.offload_param"].keys()),
        (comm.CommsLoggerConfig, SECTIONS["comms_logger"].keys()),
        (monitor.TensorBoardConfig, SECTIONS["tensorboard"].keys()),
        (monitor.WandbConfig, SECTIONS["wandb"].keys()),
        (monitor.CSVConfig, SECTIONS["csv_monitor"].keys()),
    ):
        fields = model.model_fields
        assert known == set(fields) | {field.alias for field in fields.values() if field.alias}
    options = pytest.importorskip("deepspeed.profiling.config").DeepSpeedFlopsProfilerConfig({})
    assert SECTIONS["flops_profiler"].keys() == vars(options).keys()


def test_types_match_the_installed_deepspeed() -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    for name, field in zero.DeepSpeedZeroConfig.model_fields.items():
        kind = SECTIONS["zero_optimization"][name]
        if name != "stage":
            assert kind is dict or kind.__name__ in str(field.annotation), name
