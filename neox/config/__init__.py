"""What is asked for: one resolved, typed, frozen configuration. Imports no torch."""

from neox.config.config import Config, config_from_dict, load_config
from neox.config.data import DataConfig, TokenizerConfig
from neox.config.datasets import named_datasets, named_documents
from neox.config.deepspeed import DeepSpeedConfig
from neox.config.engine import deepspeed_dict
from neox.config.generation import EvaluationConfig, GenerationConfig
from neox.config.launch import LaunchConfig
from neox.config.loaded import LoadedModel, ModelReader
from neox.config.logging import LoggingConfig
from neox.config.lora import LoraConfig
from neox.config.model import ModelConfig
from neox.config.optimization import BatchConfig, OptimizerConfig, ScheduleConfig
from neox.config.parallel import ParallelConfig
from neox.config.preference import ComparisonConfig, PreferenceConfig
from neox.config.reliability import ReliabilityConfig
from neox.config.requirements import check_training
from neox.config.training import CheckpointConfig, TrainingConfig
from neox.config.yaml_files import resolve_config_paths, split_overrides

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "ComparisonConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "LaunchConfig",
    "LoadedModel",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "ModelReader",
    "OptimizerConfig",
    "ParallelConfig",
    "PreferenceConfig",
    "ReliabilityConfig",
    "ScheduleConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "check_training",
    "config_from_dict",
    "deepspeed_dict",
    "load_config",
    "named_datasets",
    "named_documents",
    "resolve_config_paths",
    "split_overrides",
]
