"""When a run is saved, and saving it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from neox.checkpoint.conversion.export import export_beside
from neox.checkpoint.native.again import write_patiently
from neox.checkpoint.native.commit import prune_checkpoints
from neox.checkpoint.native.manifest import Manifest, Progress
from neox.checkpoint.native.store import StoredTensor, Team, write_checkpoint
from neox.config import Config
from neox.parallel.rng import rng_state
from neox.patience import Patience
from neox.training.background import Background
from neox.training.checkpoints import SCALER_FIELDS, layout_of
from neox.training.engine import Engine
from neox.training.forward_check import forward_losses
from neox.training.provenance import provenance
from neox.training.schedule import LRSchedule
from neox.training.state import optimizer_step, owned_tensors
from neox.training.team import team_of, tell
from neox.training.uploads import Uploads
from neox.watch import phase


class Saver:
    """Saves a run: at once, or in the background while it goes on (`async_save`).

    In the background every rank holds a copy of what it writes in the host's memory, and a save waits for the one
    before it.
    """

    def __init__(self, engine: Engine, schedule: LRSchedule) -> None:
        settings = engine.config.checkpoint
        self.engine = engine
        self.schedule = schedule
        self._uploads = Uploads(settings) if settings.save is not None and settings.s3_path is not None else None
        in_background = settings.save is not None and settings.async_save
        self._background = Background(engine.mesh) if in_background else None
        self.newest: int | None = None
        """Iteration of the checkpoint written last; None before the first."""
        self.longest: float | None = None
        """Seconds that writing a checkpoint took at most; None before the first."""

    @property
    def seconds_to_save(self) -> float | None:
        """How long a save takes at worst: in the background there may be another one to wait for. None if unknown."""
        return None if self.longest is None else self.longest * (1 if self._background is None else 2)

    @phase("saving")
    def save(self, progress: Progress) -> None:
        """Write a checkpoint of the whole run; a collective over all ranks.

        Raises:
            CheckpointError: on every rank, if one could not write this checkpoint, or the one before it.
        """
        if self._background is not None:
            self._background.wait()
        manifest = _manifest(self.engine, progress, self.schedule)
        if self._background is None:
            self._write(lambda: _stored(self.engine), manifest, team_of(self.engine.mesh))
            return
        copies = list(_stored(self.engine))
        self._background.start(lambda team: self._write(lambda: iter(copies), manifest, team))

    def look(self) -> None:
        """Raise on all ranks if what is written in the background has failed. A collective."""
        if self._background is not None:
            self._background.look()

    @phase("saving")
    def finish(self) -> None:
        """Wait for what is written in the background; raises if that fails."""
        if self._background is not None:
            self._background.wait()

    def _write(self, tensors: Callable[[], Iterator[StoredTensor]], manifest: Manifest, team: Team) -> None:
        config, mesh = self.engine.config, self.engine.mesh
        settings = config.checkpoint
        assert settings.save is not None, "saving was asked for"
        begun = time.monotonic()
        root = Path(settings.save)
        folder = write_patiently(
            lambda: write_checkpoint(
                root,
                iteration=manifest.progress.iteration,
                tensors=tensors(),
                manifest=manifest,
                configs=config.files,
                team=team,
                add=partial(export_beside, config=config) if settings.save_hf else None,
            ),
            root,
            team=team,
            patience=Patience(config.reliability.retry_time),
            keep=settings.keep_last_n_checkpoints,
            lineage=self.engine.lineage,
            tell=partial(tell, mesh),
        )
        warning = self._uploads.upload(folder, team) if self._uploads is not None else None
        if warning is not None:
            tell(mesh, warning)
        if settings.keep_last_n_checkpoints and mesh.rank == 0:
            prune_checkpoints(folder.parent, settings.keep_last_n_checkpoints, self.engine.lineage)
        self.newest = manifest.progress.iteration
        self.longest = max(self.longest or 0.0, time.monotonic() - begun)


def _manifest(engine: Engine, progress: Progress, schedule: LRSchedule) -> Manifest:
    """Everything but the tensors; a collective where forward losses are asked for."""
    config, mesh = engine.config, engine.mesh
    progress = replace(progress, optimizer_step=optimizer_step(engine), loss_scaler=scaler_state(engine))
    assert config.model.padded_vocab_size is not None, "the vocabulary was resolved before the model was built"
    return Manifest(
        progress=progress,
        layout=layout_of(config, mesh),
        padded_vocab_size=config.model.padded_vocab_size,
        precision=config.model.precision,
        schedule=dict(schedule.state_dict(progress.schedule_step)),
        optimizer=None if config.checkpoint.no_save_optim else config.optimizer.type,
        config=config.to_flat() | _settled(engine),
        environment=provenance(config) if mesh.rank == 0 else {},  # whose manifest is the one that is written
        forward_losses=forward_losses(engine),
        run=engine.lineage.run,
        lineage=list(engine.lineage.parents),
        files={},
        tensors={},
    )


def _settled(engine: Engine) -> dict[str, Any]:
    """Keys that the run has settled, for one that goes on from it."""
    lora = engine.config.lora
    return ({"lora": lora.model_dump()} if lora.is_on else {}) | dict(engine.objective.recorded)


def _stored(engine: Engine) -> Iterator[StoredTensor]:
    """What this rank writes, on the CPU; every rank of its pipeline stage must run through it."""
    yield from owned_tensors(engine, with_optimizer=not engine.config.checkpoint.no_save_optim)
    if not engine.config.checkpoint.no_save_rng:
        yield StoredTensor("random", f"rng/{engine.mesh.rank}", rng_state(engine.mesh.device))


def is_saved_after(config: Config, iteration: int, *, is_last: bool) -> bool:
    """Whether a step is followed by a save: where one is due, and where this process ends."""
    return is_save_point(config, iteration) or (is_last and config.checkpoint.save is not None)


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
    power = 0
    while int(factor**power) < iteration:
        power += 1
    return int(factor**power) == iteration


def scaler_state(engine: Engine) -> dict[str, float]:
    """State of fp16's dynamic loss scale; empty in other precisions."""
    if engine.config.model.precision != "fp16":
        return {}
    scaler = engine.deepspeed.optimizer.loss_scaler
    return {field: getattr(scaler, field) for field in SCALER_FIELDS if hasattr(scaler, field)}
