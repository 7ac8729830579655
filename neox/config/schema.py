"""The sections of the configuration, and the register of every key."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from pydantic.fields import FieldInfo

from neox.config import (
    data,
    deepspeed,
    generation,
    launch,
    logging,
    lora,
    model,
    optimization,
    parallel,
    preference,
    reliability,
    training,
)
from neox.config.data import DataConfig, TokenizerConfig
from neox.config.deepspeed import DeepSpeedConfig
from neox.config.generation import EvaluationConfig, GenerationConfig
from neox.config.keys import Key, Section, Status
from neox.config.launch import LaunchConfig
from neox.config.logging import LoggingConfig
from neox.config.lora import LoraConfig
from neox.config.model import ModelConfig
from neox.config.optimization import BatchConfig, OptimizerConfig, ScheduleConfig
from neox.config.parallel import ParallelConfig
from neox.config.preference import ComparisonConfig, PreferenceConfig
from neox.config.reliability import ReliabilityConfig
from neox.config.training import CheckpointConfig, TrainingConfig

SECTIONS: MappingProxyType[str, type[Section]] = MappingProxyType(
    {
        "model": ModelConfig,
        "parallel": ParallelConfig,
        "batch": BatchConfig,
        "optimizer": OptimizerConfig,
        "schedule": ScheduleConfig,
        "data": DataConfig,
        "tokenizer": TokenizerConfig,
        "training": TrainingConfig,
        "checkpoint": CheckpointConfig,
        "logging": LoggingConfig,
        "generation": GenerationConfig,
        "evaluation": EvaluationConfig,
        "launch": LaunchConfig,
        "deepspeed": DeepSpeedConfig,
        "lora": LoraConfig,
        "preference": PreferenceConfig,
        "comparison": ComparisonConfig,
        "reliability": ReliabilityConfig,
    }
)

_TOPICS = (
    model,
    parallel,
    optimization,
    data,
    training,
    logging,
    generation,
    launch,
    deepspeed,
    lora,
    preference,
    reliability,
)


@dataclass(frozen=True)
class Place:
    """A field of a section and the dotted key it is read from."""

    field: str
    key: str
    info: FieldInfo

    @property
    def extra(self) -> dict[str, Any]:
        """What `setting` recorded."""
        extra = self.info.json_schema_extra
        assert isinstance(extra, dict), f"the field {self.field} is declared without setting()"
        return extra

    @property
    def default(self) -> Any:
        """Value when the key is absent; None for a required one."""
        return None if self.info.is_required() else self.info.default

    @property
    def rule(self) -> str:
        """How the value is derived, or what it is bound to."""
        return str(self.extra["rule"])

    @property
    def bounded_above_zero(self) -> bool:
        """Whether 0 stands for a value not known yet."""
        return any(getattr(bound, "gt", None) == 0 for bound in self.info.metadata)


@cache
def places(section: str) -> tuple[Place, ...]:
    """List the settable fields of a section."""
    found = []
    for name, info in SECTIONS[section].model_fields.items():
        extra = info.json_schema_extra
        assert isinstance(extra, dict), f"the field {section}.{name} is declared without setting()"
        if extra["status"] is not Status.DERIVED:
            found.append(Place(name, str(extra["key"] or name), info))
    return tuple(found)


def fields_with_keys() -> Iterator[tuple[str, Place]]:
    """All settable fields, with the name of their section."""
    for name in SECTIONS:
        for place in places(name):
            yield name, place


@cache
def other_keys() -> dict[str, Key]:
    """Collect the keys that no section reads, by name."""
    return {key.name: key for topic in _TOPICS for key in topic.OTHER_KEYS}


@cache
def known_keys() -> frozenset[str]:
    """Every top-level key, whatever its status."""
    return frozenset(place.key.partition(".")[0] for _, place in fields_with_keys()) | frozenset(other_keys())


def put(flat: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key inside nested mappings."""
    *parents, last = key.split(".")
    for parent in parents:
        flat = flat.setdefault(parent, {})
    flat[last] = value
