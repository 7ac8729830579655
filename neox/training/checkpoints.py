"""Saving a run and taking it up again."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from neox.checkpoint.manifest import Layout, Manifest, Progress
from neox.checkpoint.native import NativeReader, StoredTensor, Team, prune_checkpoints, write_checkpoint
from neox.config import Config
from neox.parallel.mesh import Mesh
from neox.parallel.rng import rng_state, seed_dropout, set_rng_state
from neox.training.engine import Engine
from neox.training.schedule import LRSchedule
from neox.training.state import optimizer_step, owned_tensors, restore

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def save_run(engine: Engine, progress: Progress, schedule: LRSchedule) -> Path:
    """Write a checkpoint of the whole run; a collective over all ranks.

    Returns:
        The folder that `latest` now names.
    """
    config, mesh = engine.config, engine.mesh
    assert config.checkpoint.save is not None, "saving was asked for"
    with_optimizer = not config.checkpoint.no_save_optim
    progress = replace(progress, optimizer_step=optimizer_step(engine), loss_scaler=_scaler_state(engine))
    assert config.model.padded_vocab_size is not None, "the vocabulary was resolved before the model was built"
    manifest = Manifest(
        progress=progress,
        layout=layout_of(config, mesh),
        padded_vocab_size=config.model.padded_vocab_size,
        precision=config.model.precision,
        schedule=dict(schedule.state_dict(progress.schedule_step)),
        optimizer=config.optimizer.type if with_optimizer else None,
        config=config.to_flat() | ({"lora": config.lora.model_dump()} if config.lora.is_on else {}),
        files={},
        tensors={},
    )
    root = Path(config.checkpoint.save)
    folder = write_checkpoint(
        root,
        iteration=progress.iteration,
        tensors=_stored(engine, with_optimizer=with_optimizer),
        manifest=manifest,
        configs=config.files,
        team=_team(mesh),
    )
    if config.checkpoint.keep_last_n_checkpoints and mesh.rank == 0:
        prune_checkpoints(root, config.checkpoint.keep_last_n_checkpoints)
    return folder


def _stored(engine: Engine, *, with_optimizer: bool) -> Iterator[StoredTensor]:
    """What this rank writes; every rank of its pipeline stage must run through it."""
    yield from owned_tensors(engine, with_optimizer=with_optimizer)
    if not engine.config.checkpoint.no_save_rng:
        yield StoredTensor("random", f"rng/{engine.mesh.rank}", rng_state(engine.mesh.device))


def resume_run(engine: Engine, reader: NativeReader) -> Progress:
    """Put a checkpoint's state into an engine that was built from its weights, and the dropout stream where it was."""
    config = engine.config
    restore(engine, reader, with_optimizer=not config.checkpoint.no_load_optim)
    progress = reader.manifest.progress
    if progress.loss_scaler:
        _set_scaler_state(engine, progress.loss_scaler)
    restore_dropout_stream(config, engine.mesh, reader)
    return progress


def restore_dropout_stream(config: Config, mesh: Mesh, reader: NativeReader) -> None:
    """Continue each rank's stream exactly where the layout is the one that saved it; start new ones where it is not.

    A new stream is seeded by (seed, iteration, stage, data rank), so no numbers are drawn twice.
    """
    key = f"rng/{mesh.rank}"
    same_layout = reader.manifest.layout == layout_of(config, mesh)
    if same_layout and key in reader and not config.checkpoint.no_load_rng:
        set_rng_state(reader.tensor(key), mesh.device)
    else:
        seed_dropout(config.training.seed, mesh, step=reader.manifest.progress.iteration)


def layout_of(config: Config, mesh: Mesh) -> Layout:
    """The grid as a checkpoint records it."""
    return Layout(
        pipe_parallel_size=mesh.pipe_size,
        data_parallel_size=mesh.data_size,
        model_parallel_size=mesh.tensor_size,
        zero_stage=config.parallel.zero_stage,
    )


def is_save_point(config: Config, iteration: int) -> bool:
    """Whether a checkpoint is due after this many iterations.

    `checkpoint_scale: linear` saves every `checkpoint_factor` iterations, `log` at the whole parts of its powers;
    `extra_save_iters` are added.
    """
    settings = config.checkpoint
    if settings.save is None:
        return False
    if iteration in settings.extra_save_iters:
        return True
    factor = settings.checkpoint_factor
    if factor is None or iteration == 0:
        return False
    if settings.checkpoint_scale == "linear":
        return iteration % factor == 0
    power = 1.0
    while int(power) < iteration:
        power *= factor
    return int(power) == iteration


def _team(mesh: Mesh) -> Team:
    def gather(item: object) -> list[object]:
        everyone: list[object] = [None] * mesh.world_size
        dist.all_gather_object(everyone, item)
        return everyone

    return Team(rank=mesh.rank, size=mesh.world_size, gather=gather)


def _scaler_state(engine: Engine) -> dict[str, float]:
    if engine.config.model.precision != "fp16":
        return {}
    scaler = engine.deepspeed.optimizer.loss_scaler
    return {field: getattr(scaler, field) for field in SCALER_FIELDS if hasattr(scaler, field)}


def _set_scaler_state(engine: Engine, state: dict[str, float]) -> None:
    scaler = engine.deepspeed.optimizer.loss_scaler
    for field, value in state.items():
        setattr(scaler, field, value)
