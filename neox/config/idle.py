"""Keys of training that are set and do nothing, since another one that they need is not set."""

from collections.abc import Iterator

from neox.config.config import Config
from neox.config.schema import fields_with_keys


def idle_keys(config: Config) -> Iterator[str]:
    """A line for each reason why keys that were given, and not at their defaults, have no effect on the run."""
    defaults = {place.key: place.info.default for _, place in fields_with_keys()}
    for reason, (keys, is_idle) in _rules(config).items():
        given = [key for key in keys if key in config.given and config.given[key] != defaults[key]]
        if is_idle and given:
            yield f"{', '.join(given)} {'have' if len(given) > 1 else 'has'} no effect: {reason}"


def _rules(config: Config) -> dict[str, tuple[tuple[str, ...], bool]]:
    """By the reason: the keys, and whether it holds."""
    training, logging, guards, end = config.training, config.logging, config.reliability, config.training.train_iters
    saving = ("checkpoint_factor", "extra_save_iters", "keep_last_n_checkpoints", "save_hf", "async_save")
    comet = ("comet_workspace", "comet_project", "comet_experiment_name", "comet_tags", "comet_others")
    noise = ("gradient_noise_scale_n_batches", "gradient_noise_scale_cpu_offload")
    profiled = f"profile_step_start {logging.profile_step_start} is above train_iters {end}"
    return {
        "save is not set, so no checkpoint is written": (saving, config.checkpoint.save is None),
        "load is not set": (("load_fallback",), config.checkpoint.load is None),
        "checkpoint_activations is false": (
            ("checkpoint_num_layers", "checkpoint_in_cpu"),
            not training.checkpoint_activations,
        ),
        "gradient_norm_limit is not set": (("on_large_gradient",), guards.gradient_norm_limit is None),
        "loss_spike_deviations is not set": (
            ("on_loss_spike", "loss_spike_window"),
            guards.loss_spike_deviations is None,
        ),
        "replica_check_interval is 0": (("on_replica_mismatch",), not guards.replica_check_interval),
        "pack_impl packed cuts documents": (("allow_chopped",), config.data.pack_impl == "packed"),
        "data_path is one dataset": (("weight_by_num_documents",), config.data.data_path is not None),
        "there is neither validation nor a test": (("char_level_ppl",), not (training.do_valid or training.do_test)),
        "lr_decay_style is constant": (("min_lr",), config.schedule.lr_decay_style == "constant"),
        "use_comet is not true": (comet, not logging.use_comet),
        "log_gradient_noise_scale is false": (noise, not logging.log_gradient_noise_scale),
        "memory_profiling is false": (("memory_profiling_path",), not logging.memory_profiling),
        "neither profile nor memory_profiling is true": (
            ("profile_step_start", "profile_step_stop"),
            not (logging.profile or logging.memory_profiling),
        ),
        profiled: (("profile",), end is not None and logging.profile_step_start > end),
    }
