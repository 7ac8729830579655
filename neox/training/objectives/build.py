"""The objective of a run, with its reference."""

from collections.abc import Mapping
from pathlib import Path

import torch

from neox.checkpoint.lora import merged
from neox.checkpoint.open import locate_checkpoint, open_checkpoint
from neox.checkpoint.upstream.reader import Hints
from neox.checkpoint.upstream.run import UpstreamRun
from neox.checkpoint.weights import weight_source
from neox.config import Config
from neox.errors import CheckpointError
from neox.model.build import DTYPES, WeightSource, fresh_weights
from neox.model.head import is_reward_head
from neox.model.init import initial_tensor
from neox.parallel.mesh import Mesh
from neox.training.objectives.dpo import DirectPreference
from neox.training.objectives.kto import KahnemanTversky
from neox.training.objectives.objective import NextToken, Objective
from neox.training.objectives.reinforce import Reinforce
from neox.training.objectives.reward import RewardModel
from neox.training.objectives.scores import Reference
from neox.training.origin import Origin

KEY = "reference_load"


def build_objective(config: Config, mesh: Mesh, origin: Origin | None) -> Objective:
    """The objective that `train_impl` names.

    Raises:
        CheckpointError: the reference cannot be read, or `load` holds a run with another objective.
    """
    settings = config.preference
    if settings.train_impl == "normal":
        return NextToken()
    if settings.train_impl == "rm":
        return RewardModel(settings.z_loss)
    reference, recorded = _reference(config, mesh, origin)
    dtype = DTYPES[config.model.precision]
    if settings.train_impl == "dpo":
        return DirectPreference(settings, dtype, reference, recorded)
    if settings.train_impl == "kto":
        return KahnemanTversky(settings, dtype, reference, recorded)
    return Reinforce(settings, dtype, reference, recorded)


def _reference(config: Config, mesh: Mesh, origin: Origin | None) -> tuple[Reference | None, Mapping[str, str]]:
    """The reference, None where the objective has none; and what a checkpoint must keep of where it came from.

    That is kept also where no reference runs: whoever goes on may want one, or have the log-probabilities no more.
    """
    place = _reference_place(config, origin)
    recorded = {} if place is None else {KEY: str(place)}
    if config.reference_files is not None:
        return Reference(None), recorded
    if not config.preference.needs_reference(None):
        return None, recorded
    folder = reference_folder(config, origin)
    source = fresh_weights(config) if folder is None else _weights(folder, config)
    return Reference.build(config, mesh, source), recorded


def _weights(folder: Path, config: Config) -> WeightSource:
    return weight_source(merged(open_checkpoint(folder, hints=Hints.of(config.model))))


def reference_folder(config: Config, origin: Origin | None) -> Path | None:
    """Where the weights of the reference are; None for those that `seed` gives.

    They are `reference_load`, or the weights that the run began with, which a run that is taken up has kept.

    Raises:
        CheckpointError: the folder is gone, or GPT-NeoX began the run, which does not tell.
    """
    folder = _reference_place(config, origin)
    if folder is None and origin is not None and isinstance(origin.run, UpstreamRun):
        raise CheckpointError(
            f"load {origin.run.folder}: GPT-NeoX does not keep what the reference of a run was; set {KEY} to the "
            "checkpoint that it began with"
        )
    if folder is not None and not folder.is_dir():
        raise CheckpointError(f"{KEY} {folder}: no such folder; name the checkpoint of the reference")
    return folder


def _reference_place(config: Config, origin: Origin | None) -> Path | None:
    """`reference_folder`, whether or not it is there."""
    given: str | None = config.preference.reference_load
    if given is None and origin is not None:
        given = origin.run.manifest.config.get(KEY) if origin.run else str(origin.weights.folder)
    return None if given is None else Path(given).resolve()


def check_objective(config: Config, origin: Origin | None) -> None:
    """Compare the objective with that of the run that is taken up, and see that there is a reference.

    Raises:
        CheckpointError: they differ, or it cannot be found.
    """
    if origin is not None and origin.run is not None:
        before, now = origin.run.manifest.config.get("train_impl", "normal"), config.preference.train_impl
        if before != now:
            raise CheckpointError(
                f"load {origin.run.folder}: was trained with train_impl {before}, the configuration has {now}; "
                "set finetune: true to start anew from its weights"
            )
    if config.preference.needs_reference(config.generation.precompute_model_name):
        folder = reference_folder(config, origin)
        if folder is not None:
            locate_checkpoint(folder)


def with_fresh_reward_head(weights: WeightSource, config: Config, origin: Origin | None) -> WeightSource:
    """A source of weights that has a head for rewards too, where a language model's checkpoint has none."""
    if not config.model.has_reward_head or origin is None:
        return weights

    def source(name: str, shape: torch.Size) -> torch.Tensor:
        if is_reward_head(name) and name not in origin.weights:
            return initial_tensor(name, shape, config=config.model, seed=config.training.seed)
        return weights(name, shape)

    return source
