"""The whole configuration, made once from the keys that were set."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

from neox.config.check import check_names, check_other_keys, drop_empty, drop_unset, hollow, read_sections
from neox.config.data import DataConfig, TokenizerConfig
from neox.config.deepspeed import DeepSpeedConfig
from neox.config.generation import EvaluationConfig, GenerationConfig
from neox.config.keys import Section
from neox.config.launch import LaunchConfig
from neox.config.loaded import ModelReader, compare_models, take_absent_keys
from neox.config.logging import LoggingConfig
from neox.config.lora import LoraConfig, resolve_lora
from neox.config.model import ModelConfig
from neox.config.optimization import BatchConfig, OptimizerConfig, ScheduleConfig
from neox.config.parallel import ParallelConfig
from neox.config.preference import ComparisonConfig, PreferenceConfig
from neox.config.problems import NO_PLACE, Problems
from neox.config.reliability import ReliabilityConfig
from neox.config.resolve_amp import resolve_amp
from neox.config.resolve_deepspeed import resolve_deepspeed, settle_types
from neox.config.resolve_elasticity import resolve_elasticity
from neox.config.resolve_growth import check_curriculum, check_ramp
from neox.config.resolve_launch import check_launch
from neox.config.resolve_logging import check_logging
from neox.config.resolve_model import resolve_model
from neox.config.resolve_optimizer import resolve_optimizer, resolve_schedule
from neox.config.resolve_parallel import resolve_batch, resolve_parallel
from neox.config.resolve_preference import Surroundings, check_preference
from neox.config.resolve_reliability import check_bad_steps, check_comparisons, check_elastic, check_restarts
from neox.config.resolve_training import check_checkpoint, check_data, resolve_training
from neox.config.schema import fields_with_keys, put
from neox.config.training import CheckpointConfig, TrainingConfig
from neox.config.yaml_files import Merged, from_mapping, merge, problems_of, resolve_config_paths


def load_config(
    files: Sequence[str | Path],
    *,
    overrides: Sequence[str] = (),
    override_files: Sequence[str | Path] = (),
    world_size: int | None = None,
    read_model: ModelReader | None = None,
) -> "Config":
    """Read YAML files, apply overrides and resolve the whole.

    Args:
        files: YAML files, with or without `.yml`; none may contradict another.
        overrides: `key=value` or `optimizer.params.lr=3e-4`, the value read as YAML; they win over files.
        override_files: YAML files whose keys replace those of `files` and of each other, mapping by mapping;
            each replacement becomes a notice.
        world_size: number of processes; None before it is known, which leaves the batch open.
        read_model: opens the checkpoint of `load`, whose model fills in what is absent and is compared with the rest.

    Raises:
        ConfigError: with one line for each mistake.
        CheckpointError: from `read_model`.
    """
    merged = merge(resolve_config_paths(files), overrides, override_files=resolve_config_paths(override_files))
    return _build(merged, world_size=world_size, read_model=read_model)


def config_from_dict(
    flat: Mapping[str, Any], *, world_size: int | None = 1, read_model: ModelReader | None = None
) -> "Config":
    """Resolve flat keys, the same as in YAML; see `load_config` for `read_model`.

    Raises:
        ConfigError: with one line for each mistake.
        CheckpointError: from `read_model`.
    """
    return _build(from_mapping(deepcopy(dict(flat))), world_size=world_size, read_model=read_model)


class Config(Section):
    """One resolved configuration. It is made before any process exists and never changes."""

    model: ModelConfig
    parallel: ParallelConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    training: TrainingConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    generation: GenerationConfig
    evaluation: EvaluationConfig
    launch: LaunchConfig
    deepspeed: DeepSpeedConfig
    lora: LoraConfig
    preference: PreferenceConfig
    comparison: ComparisonConfig
    reliability: ReliabilityConfig
    given: dict[str, Any]
    """The flat keys that were set, as they were set."""
    sources: dict[str, str]
    """Where each key came from: "file:line", "command line" or "default"."""
    files: dict[str, str]
    """Text of each YAML file by name."""
    replaced: tuple[str, ...]
    """One line for each value that an override file replaced."""
    notices: tuple[str, ...]
    """Lines that a user should see once: unused keys, settings that run as something else."""

    def to_flat(self, *, resolved: bool = False) -> dict[str, Any]:
        """Return flat keys that `config_from_dict` turns into this configuration again.

        Args:
            resolved: every setting at the value it runs with, instead of only the keys that were set. Only
                the latter can be resolved again for another number of processes.
        """
        flat = deepcopy(self.given)
        if not resolved:
            return flat
        for name, place in fields_with_keys():
            value = getattr(getattr(self, name), place.field)
            if value is not None and not (place.bounded_above_zero and value == 0):
                put(flat, place.key, _plain(value))
        # The width is resolved: the factor it came from would clash with it.
        flat.pop("expansion_factor", None)
        flat.pop("amp", None)  # fp16 is there
        if self.batch.train_micro_batch_size_per_gpu:
            flat.pop("elasticity", None)  # the batch that it gives is there
        if not self.optimizer.is_given:
            flat.pop("optimizer", None)
        else:
            flat["optimizer"]["params"] |= {"lr": self.optimizer.lr}
        return flat

    @property
    def reference_files(self) -> str | None:
        """Name of the log-probabilities that the objective reads beside its documents; None where it reads none."""
        objective, name = self.preference, self.generation.precompute_model_name
        return name if objective.needs_reference(None) and not objective.needs_reference(name) else None

    def with_world_size(self, world_size: int) -> "Config":
        """Resolve again for a number of processes.

        Raises:
            ConfigError: the layout or the batch does not fit it.
        """
        return _rebuild(self, {}, world_size=world_size)

    def with_vocabulary(self, padded_vocab_size: int) -> "Config":
        """Set the number of rows of the embedding."""
        return _rebuild(self, {"padded_vocab_size": padded_vocab_size}, world_size=self.parallel.world_size)

    def passing_over_damage(self) -> "Config":
        """Load the newest whole checkpoint where the one that is asked for is damaged."""
        return _rebuild(self, {"load_fallback": True}, world_size=self.parallel.world_size)

    def going_on_from_save(self) -> "Config":
        """Take up all of the run from the newest whole checkpoint in `save`, whatever was to be loaded instead."""
        changes = {"load": self.checkpoint.save, "load_fallback": True, "iteration": None}
        whole = dict.fromkeys(("finetune", "no_load_optim", "no_load_rng"), False)
        return _rebuild(self, changes | whole, world_size=self.parallel.world_size)

    def with_train_iters(self, train_iters: int) -> "Config":
        """Replace train_epochs by the number of iterations that the data gives."""
        return _rebuild(self, {"train_iters": train_iters, "train_epochs": None}, world_size=self.parallel.world_size)


def _build(merged: Merged, *, world_size: int | None, read_model: ModelReader | None = None) -> Config:
    loaded = read_model(merged.values) if read_model else None
    if loaded is not None:
        take_absent_keys(merged, loaded)
    problems = problems_of(merged)
    values = drop_unset(merged.values)
    check_names(merged.values, problems)
    notices = [*merged.replaced, *drop_empty(values, problems), *check_other_keys(values, problems)]
    sections = read_sections(values, problems)
    resolved = _resolve(sections, world_size=world_size, problems=problems, notices=notices)
    if loaded is not None:
        _apply(resolved, partial(compare_models, loaded=loaded, problems=problems), "model")
    problems.raise_any()
    sources = {place.key: "default" for _, place in fields_with_keys()} | dict.fromkeys(values, "given")
    return Config(
        **cast(dict[str, Any], resolved),
        given=values,
        sources=sources | merged.sources,
        files=merged.files,
        replaced=tuple(merged.replaced),
        notices=tuple(notices),
    )


def _resolve(
    sections: dict[str, Section], *, world_size: int | None, problems: Problems, notices: list[str]
) -> dict[str, Section]:
    """Apply the rules that compare keys."""
    resolved = dict(sections)
    _resolve_layout(partial(_apply, resolved), world_size, problems, notices)
    _resolve_run(partial(_apply, resolved), problems, notices)
    return resolved


def _apply(resolved: dict[str, Section], rule: Callable[..., Section | None], *needs: str) -> None:
    """Replace the first section by what the rule makes of all that it needs.

    A rule goes as far as it can: it ends where it reads a field that is wrong by itself, which has been told.
    Its section is then a hollow one, so that the rules that build on it end where they read that.
    """
    target = needs[0]
    try:
        resolved[target] = rule(*(resolved[name] for name in needs)) or resolved[target]
    except AttributeError as error:
        if not (isinstance(error.obj, Section) and error.name in type(error.obj).model_fields):
            raise
        resolved[target] = hollow(type(resolved[target]))


def _resolve_layout(apply: Callable[..., None], world_size: int | None, problems: Problems, notices: list[str]) -> None:
    """Model, processes and batch."""
    apply(lambda deepspeed, model: resolve_amp(deepspeed, model, problems, notices), "deepspeed", "model")
    apply(lambda deepspeed, model: resolve_deepspeed(deepspeed, model, problems, notices), "deepspeed", "model")
    apply(lambda model, deepspeed: resolve_model(model, deepspeed, problems, notices), "model", "deepspeed")
    apply(settle_types, "deepspeed", "model")
    apply(
        lambda parallel, model, deepspeed: resolve_parallel(
            parallel, model, deepspeed, world_size=world_size, problems=problems, notices=notices
        ),
        "parallel",
        "model",
        "deepspeed",
    )
    apply(lambda batch, parallel: resolve_elasticity(batch, parallel, problems, notices), "batch", "parallel")
    apply(
        lambda reliability, batch, checkpoint: check_elastic(
            problems, reliability=reliability, batch=batch, checkpoint=checkpoint
        ),
        "reliability",
        "batch",
        "checkpoint",
    )
    apply(
        lambda batch, parallel, reliability: resolve_batch(
            batch, parallel, problems, notices, elastic=reliability.elastic
        ),
        "batch",
        "parallel",
        "reliability",
    )


def _resolve_run(apply: Callable[..., None], problems: Problems, notices: list[str]) -> None:
    """Training and all around it, given the layout."""
    apply(lambda training, data: resolve_training(training, data, problems), "training", "data")
    apply(
        lambda optimizer, parallel, deepspeed: resolve_optimizer(optimizer, parallel, deepspeed, problems, notices),
        "optimizer",
        "parallel",
        "deepspeed",
    )
    apply(
        lambda schedule, training, optimizer: resolve_schedule(schedule, training, optimizer, problems, notices),
        "schedule",
        "training",
        "optimizer",
    )
    apply(lambda lora, model: resolve_lora(lora, model, problems), "lora", "model")
    apply(
        lambda batch, parallel, training: check_ramp(batch, parallel, training, problems),
        "batch",
        "parallel",
        "training",
    )
    apply(
        lambda training, model, parallel: check_curriculum(training, model, parallel, problems),
        "training",
        "model",
        "parallel",
    )
    apply(lambda data, comparison: check_data(data, comparison, problems, notices), "data", "comparison")
    apply(lambda checkpoint: check_checkpoint(checkpoint, problems), "checkpoint")
    apply(lambda logging: check_logging(logging, problems), "logging")
    apply(lambda launch: check_launch(launch, problems), "launch")
    _check_reliability(apply, problems, notices)
    _resolve_objective(apply, problems, notices)


def _check_reliability(apply: Callable[..., None], problems: Problems, notices: list[str]) -> None:
    """What a long run does about failures, given what it saves and how it is laid out."""
    apply(
        lambda reliability, checkpoint: check_restarts(problems, reliability=reliability, checkpoint=checkpoint),
        "reliability",
        "checkpoint",
    )
    apply(
        lambda reliability, checkpoint, comparison, deepspeed: check_bad_steps(
            problems, reliability=reliability, checkpoint=checkpoint, comparison=comparison, deepspeed=deepspeed
        ),
        "reliability",
        "checkpoint",
        "comparison",
        "deepspeed",
    )
    apply(
        lambda reliability, parallel, deepspeed: check_comparisons(
            problems, notices, reliability=reliability, parallel=parallel, deepspeed=deepspeed
        ),
        "reliability",
        "parallel",
        "deepspeed",
    )


def _resolve_objective(apply: Callable[..., None], problems: Problems, notices: list[str]) -> None:
    """What is minimised, and what it needs of all the rest."""
    apply(
        lambda model, preference: model.model_copy(update={"has_reward_head": preference.train_impl == "rm"}),
        "model",
        "preference",
    )
    apply(
        lambda preference, comparison, *around: check_preference(
            preference, comparison, Surroundings(*around), problems, notices
        ),
        "preference",
        "comparison",
        *Surroundings._fields,
    )


def _rebuild(config: Config, changes: dict[str, Any], *, world_size: int | None) -> Config:
    values = deepcopy(config.given) | changes
    sources = {key: place for key, place in config.sources.items() if place not in NO_PLACE}
    merged = Merged(values=values, sources=sources, files=config.files, replaced=list(config.replaced))
    return _build(merged, world_size=world_size)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else deepcopy(value)
