"""Settings as GPT-NeoX's ready-made files have them: what loads, what is announced, what is refused and why."""

from typing import Any

import pytest

from neox.config import Config, config_from_dict, deepspeed_dict
from neox.errors import ConfigError

MODEL = {
    "pipe-parallel-size": 1,
    "model-parallel-size": 1,
    "num-layers": 12,
    "hidden-size": 768,
    "num-attention-heads": 12,
    "seq-length": 2048,
    "max-position-embeddings": 2048,
    "norm": "layernorm",
    "pos-emb": "rotary",
    "rotary-pct": 0.25,
    "no-weight-tying": True,
    "gpt-j-residual": True,
    "output-layer-parallelism": "column",
    "scaled-upper-triang-masked-softmax-fusion": True,
    "bias-gelu-fusion": True,
    "rope_fusion": False,
    "init_method": "small_init",
    "output_layer_init_method": "wang_init",
}
TRAINING = {
    "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95], "eps": 1.0e-8}},
    "min_lr": 0.00006,
    "zero_optimization": {
        "stage": 1,
        "allgather_partitions": True,
        "allgather_bucket_size": 500000000,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 500000000,
        "contiguous_gradients": True,
        "cpu_offload": False,
    },
    "train_micro_batch_size_per_gpu": 32,
    "data-impl": "mmap",
    "checkpoint-activations": True,
    "partition-activations": True,
    "synchronize-each-layer": True,
    "gradient_clipping": 1.0,
    "hidden-dropout": 0,
    "fp16": {"fp16": True, "enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 12},
    "lr-decay-iters": 143000,
    "train-iters": 143000,
    "lr-decay-style": "cosine",
    "checkpoint-factor": 1000,
    "extra-save-iters": [0, 1, 2, 4, 8],
    "save": "checkpoints",
    "hostfile": "/mock_path",
}
LLAMA = {
    "norm": "rmsnorm",
    "rms_norm_epsilon": 1e-5,
    "bias-gelu-fusion": False,
    "gpt-j-residual": False,
    "rotary-pct": 1,
    "use_bias_in_norms": False,
    "use_bias_in_attn_linear": False,
    "use_bias_in_mlp": False,
    "activation": "swiglu",
    "intermediate_size": 14336,
    "num_kv_heads": 4,
    "attention_config": [[["flash"], 12]],
}


def load(changes: dict[str, Any]) -> Config:
    flat = {key.replace("-", "_"): value for key, value in (MODEL | TRAINING | changes).items()}
    return config_from_dict({key: value for key, value in flat.items() if value is not None}, world_size=8)


@pytest.mark.parametrize(
    ("changes", "announced"),
    [
        ({"attention-config": [[["flash"], 12]]}, []),
        (LLAMA | {"mlp_multiple_of": 256}, ["use_bias_in_norms"]),
        (LLAMA | {"sliding_window_width": 1024, "max-position-embeddings": 131072}, ["use_bias_in_norms"]),
        (LLAMA | {"norm": "non_parametric_layernorm", "rms_norm_epsilon": None}, ["use_bias_in_norms"]),
        (
            LLAMA
            | {
                "model-parallel-size": 4,
                "mlp_multiple_of": 14336,
                "precision": "bfloat16",
                "fp16": None,
                "bf16": {"enabled": True},
                "fp32_allreduce": True,
                "data_types": {"grad_accum_dtype": "fp32"},
                "use_flashattn_swiglu": True,
                "rmsnorm_fusion": True,
            },
            ["use_bias_in_norms", "fp32_allreduce", "use_flashattn_swiglu", "rmsnorm_fusion"],
        ),
        ({"te_layernorm_mlp": True, "te_mha": True, "te_fp8_wgrad": False, "te_fp8_margin": 0}, [
            "te_layernorm_mlp", "te_mha", "te_fp8_wgrad", "te_fp8_margin",
        ]),
        ({"fp16-lm-cross-entropy": True, "zero_optimization": {"stage": 0}}, ["fp16_lm_cross_entropy", "stage 0"]),
        ({"launcher": "slurm", "deepspeed_slurm": True, "comment": "neox"}, []),
        ({"checkpoint_validation_with_forward_pass": False, "text_gen_type": "unconditional", "num_samples": 10}, []),
        ({"profile": True, "memory_profiling": True, "memory_profiling_path": "tensorboard"}, []),
    ],
)  # fmt: skip
def test_loads(changes: dict[str, Any], announced: list[str]) -> None:
    notices = load(changes).notices
    common = ["fp16.fp16"] if changes.get("fp16", TRAINING["fp16"]) else []
    common += ["scaled_upper_triang_masked_softmax_fusion", "partition_activations", "synchronize_each_layer"]
    assert len(notices) == len(announced) + len(common)
    for name in announced + common:
        assert sum(name in notice for notice in notices) == 1


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"checkpoint-factor": None, "extra-save-iters": None, "save-interval": 500},
         ["save_interval: unknown key; did you mean 'checkpoint_factor'?"]),
        ({"gas": 1}, ["gas: unknown key; did you mean 'gradient_accumulation_steps'?"]),
        ({"mlp_type": "llama"}, ["mlp_type: unknown key; remove it, and for mlp_type: llama set activation: swiglu"]),
        ({"global_num_gpus": 1}, ["global_num_gpus: cannot be set; leave it out: the launcher counts processes"]),
        ({"rpe_num_buckets": 8},
         ["rpe_num_buckets: 8 is not supported yet (Buckets of relative positions); remove the key or set it to 32"]),
        ({"attention_config": [[["mamba"], 12]]}, ["attention_config: 'mamba' is not supported yet; "]),
        ({"attention_config": [[["gmlp"], "all"]]}, ["attention_config: 'gmlp' is not supported yet; "]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 6e-4, "eps": "1.0e_8"}}},
         ["optimizer.params.eps: expected a number, got '1.0e_8'; write 1.0e-8"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 6e-4, "max_grad_norm": 1.0}}},
         ["optimizer.params.max_grad_norm: unknown argument of adam; remove it, gradient_clipping is what clips"]),
        ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 6e-4, "freeze_step": 23000}}},
         ["optimizer.type: 'onebitadam' is gone from DeepSpeed; set type: Adam"]),
        ({"autotuning": {"enabled": True}}, ["autotuning: {'enabled': True} is not supported yet"]),
    ],
)  # fmt: skip
def test_is_refused_in_one_line(changes: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(changes)
    said = str(error.value).splitlines()
    assert len(said) == len(lines)
    assert all(line.startswith(start) for line, start in zip(said, lines, strict=True))


OLD_BF16 = {
    "enabled": True,
    "type": "bfloat16",
    "auto_cast": True,
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 12,
    "hysteresis": 2,
    "min_loss_scale": 1,
}
"""As GPT-NeoX's pythia/1B.yml has it, beside fp32_allreduce and ZeRO stage 0."""


@pytest.mark.parametrize("others", [{}, {"precision": "bfloat16"}, {"bf16": {"enabled": True}}])
def test_bfloat16_as_it_was_spelt_before_its_section(others: dict[str, Any]) -> None:
    zero = TRAINING["zero_optimization"] | {"stage": 0}
    config = load({"fp16": OLD_BF16, "fp32_allreduce": True, "zero_optimization": zero} | others)
    assert config.model.precision == "bfloat16"
    (line,) = [notice for notice in config.notices if "fp16" in notice]
    assert line.startswith("fp16.type: runs in bfloat16")
    engine = deepspeed_dict(config)
    assert engine["bf16"] == {"enabled": True}
    assert engine["fp16"] == {"enabled": False}
    assert engine["communication_data_type"] == "fp32"
    assert engine["zero_optimization"]["stage"] == 1
    again = deepspeed_dict(config_from_dict(config.to_flat(resolved=True), world_size=8))
    assert (again["bf16"], again["fp16"]) == (engine["bf16"], engine["fp16"])


def test_the_old_spelling_switched_off_is_nothing() -> None:
    assert load({"fp16": OLD_BF16 | {"enabled": False}}).model.precision == "fp32"
