"""The whole configuration, made once from the keys that were set."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from neox.config.check import check_other_keys, drop_unset, read_sections
from neox.config.data import DataConfig, TokenizerConfig
from neox.config.deepspeed import DeepSpeedConfig
from neox.config.generation import EvaluationConfig, GenerationConfig
from neox.config.keys import Section
from neox.config.launch import LaunchConfig
from neox.config.logging import LoggingConfig
from neox.config.model import ModelConfig
from neox.config.optimization import BatchConfig, OptimizerConfig, ScheduleConfig
from neox.config.parallel import ParallelConfig
from neox.config.problems import NO_PLACE, Problems
from neox.config.resolve_model import resolve_model
from neox.config.resolve_parallel import resolve_batch, resolve_deepspeed, resolve_parallel
from neox.config.resolve_training import (
    check_checkpoint,
    check_data,
    resolve_optimizer,
    resolve_schedule,
    resolve_training,
)
from neox.config.schema import SECTIONS, fields_with_keys, put
from neox.config.training import CheckpointConfig, TrainingConfig
from neox.config.yaml_files import Merged, from_mapping, merge, problems_of, resolve_config_paths


def load_config(
    files: Sequence[str | Path], *, overrides: Sequence[str] = (), world_size: int | None = None
) -> "Config":
    """Read YAML files, apply overrides and resolve the whole.

    Args:
        files: YAML files, with or without `.yml`; none may contradict another.
        overrides: `key=value` or `optimizer.params.lr=3e-4`, the value read as YAML; they win over files.
        world_size: number of processes; None before it is known, which leaves the batch open.

    Raises:
        ConfigError: with one line for each mistake.
    """
    return _build(merge(resolve_config_paths(files), overrides), world_size=world_size)


def config_from_dict(flat: Mapping[str, Any], *, world_size: int | None = 1) -> "Config":
    """Resolve flat keys, the same as in YAML.

    Raises:
        ConfigError: with one line for each mistake.
    """
    return _build(from_mapping(deepcopy(dict(flat))), world_size=world_size)


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
    given: dict[str, Any]
    """The flat keys that were set, as they were set."""
    sources: dict[str, str]
    """Where each key came from: "file:line", "command line" or "default"."""
    files: dict[str, str]
    """Text of each YAML file by name."""
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
        if not self.optimizer.is_given:
            flat.pop("optimizer", None)
        else:
            flat["optimizer"]["params"] |= {"lr": self.optimizer.lr}
        return flat

    def with_world_size(self, world_size: int) -> "Config":
        """Resolve again for a number of processes.

        Raises:
            ConfigError: the layout or the batch does not fit it.
        """
        return _rebuild(self, {}, world_size=world_size)

    def with_vocabulary(self, padded_vocab_size: int) -> "Config":
        """Set the number of rows of the embedding."""
        return _rebuild(self, {"padded_vocab_size": padded_vocab_size}, world_size=self.parallel.world_size)

    def with_train_iters(self, train_iters: int) -> "Config":
        """Replace train_epochs by the number of iterations that the data gives."""
        return _rebuild(self, {"train_iters": train_iters, "train_epochs": None}, world_size=self.parallel.world_size)


def _build(merged: Merged, *, world_size: int | None) -> Config:
    problems = problems_of(merged)
    values = drop_unset(merged.values)
    notices = check_other_keys(values, problems)
    sections = read_sections(values, problems)
    # Rules that compare keys need every section; without one, only the mistakes so far are told.
    if len(sections) < len(SECTIONS):
        problems.raise_any()
    resolved = _resolve(sections, world_size=world_size, problems=problems, notices=notices)
    problems.raise_any()
    sources = {place.key: "default" for _, place in fields_with_keys()} | dict.fromkeys(values, "given")
    return Config(
        **cast(dict[str, Any], resolved),
        given=values,
        sources=sources | merged.sources,
        files=merged.files,
        notices=tuple(notices),
    )


def _resolve(
    sections: dict[str, Section], *, world_size: int | None, problems: Problems, notices: list[str]
) -> dict[str, Section]:
    given = cast(Any, sections)
    deepspeed = resolve_deepspeed(given["deepspeed"], problems)
    model = resolve_model(given["model"], deepspeed, problems)
    parallel = resolve_parallel(
        given["parallel"], model, deepspeed, world_size=world_size, problems=problems, notices=notices
    )
    training = resolve_training(given["training"], given["data"], problems)
    optimizer = resolve_optimizer(given["optimizer"], problems, notices)
    check_data(given["data"], problems)
    check_checkpoint(given["checkpoint"], problems)
    return sections | {
        "model": model,
        "parallel": parallel,
        "deepspeed": deepspeed,
        "batch": resolve_batch(given["batch"], parallel, problems),
        "training": training,
        "optimizer": optimizer,
        "schedule": resolve_schedule(given["schedule"], training, optimizer, problems),
    }


def _rebuild(config: Config, changes: dict[str, Any], *, world_size: int | None) -> Config:
    values = deepcopy(config.given) | changes
    sources = {key: place for key, place in config.sources.items() if place not in NO_PLACE}
    return _build(Merged(values=values, sources=sources, files=config.files), world_size=world_size)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else deepcopy(value)
