"""A whole training run in one worker, from the configuration to the last checkpoint."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from neox.checkpoint.native.manifest import Progress
from neox.checkpoint.runs import RunReader
from neox.config import Config
from neox.config.ramp import BatchRamp
from neox.data import (
    Coordinator,
    DatasetSplits,
    Done,
    Tokenizer,
    build_datasets,
    build_tokenizer,
    train_iters_for_epochs,
)
from neox.data.blending import SampleSource
from neox.data.loader import Batch
from neox.data.online import OnlineDataset
from neox.data.order import Ranges, read_before
from neox.model.build import WeightSource
from neox.parallel.mesh import Mesh, build_mesh
from neox.parallel.rng import seed_dropout
from neox.training.batches import BatchMaker
from neox.training.callbacks import Checkpoints, Evaluation, Metrics, SignsOfLife
from neox.training.checkpoints import resume_run
from neox.training.contract import told
from neox.training.curriculum import curriculum_of
from neox.training.determinism import determinism
from neox.training.ending import EarlyEnd, Outcome
from neox.training.engine import Engine
from neox.training.guards.guard import Guards
from neox.training.guards.left_out import LeftOut
from neox.training.guards.record import SkipLog
from neox.training.guards.rewind import Rewinder
from neox.training.loaders import micro_batches
from neox.training.logs.files import NoteStep
from neox.training.logs.output import logged_output
from neox.training.loop import Callback, Run
from neox.training.metrics.loggers import MetricLog
from neox.training.metrics.monitors import monitors
from neox.training.metrics.profiling import profilers
from neox.training.objectives.batches import ScoredBatchMaker
from neox.training.objectives.build import build_objective, with_fresh_reward_head
from neox.training.objectives.objective import Objective
from neox.training.origin import origin_of, weights_of
from neox.training.plain import PlainEngine
from neox.training.record import keep_record
from neox.training.replicas import comparisons
from neox.training.resumption import agree_on_origin
from neox.training.save_folder import agree_on_lineage
from neox.training.schedule import LRSchedule
from neox.training.signals import Signals, noted_signals
from neox.training.stragglers import naming_stragglers
from neox.training.team import tell, thorough_check
from neox.training.validation import Evaluator
from neox.watch import watched


def train(config: Config) -> Outcome:
    """Train as configured; RANK, WORLD_SIZE and the rest of torch's variables say which worker this is.

    Returns:
        Where the run stands at its end, and the exit status that says so.
    """
    with (
        noted_signals(config.reliability.requeue_status) as signals,
        logged_output(config),
        watched(config) as watch,
        determinism(config),
    ):

        def begin() -> None:
            signals.have_met = True
            watch.begin()

        outcome = _train(config, build_mesh(config, when_joined=begin), signals)
        # Only on success: with NCCL, leaving the group while others wait in it would hang the rank that failed.
        dist.destroy_process_group()
    return outcome


@dataclass(frozen=True)
class _Parts:
    """What a run is made of, once it has been built or taken up."""

    config: Config
    mesh: Mesh
    data: DatasetSplits
    engine: Engine
    schedule: LRSchedule
    batches: BatchMaker
    tokenizer: Tokenizer | None

    def evaluator(self, name: str, dataset: SampleSource | OnlineDataset) -> Evaluator:
        return Evaluator(name, self.engine, dataset, self.batches, self.tokenizer)

    def loader(self, progress: Progress) -> Iterator[Batch]:
        return train_loader(self.config, self.mesh, self.data, progress.consumed_samples, progress.left_out)


def _train(config: Config, mesh: Mesh, signals: Signals) -> Outcome:
    given = agree_on_origin(config, mesh)
    config = with_iterations(given)
    seed_dropout(config.training.seed, mesh)
    engine, progress, schedule = start_or_resume(config, mesh)
    done = Done(progress.iteration, read_before(progress.consumed_samples, progress.left_out))
    data = build_datasets(given, _coordinator(mesh), data_rank=mesh.data_rank, done=done)
    keep_record(config, mesh, progress)
    tokenizer = build_tokenizer(config.tokenizer) if config.training.char_level_ppl else None
    parts = _Parts(config, mesh, data, engine, schedule, batch_maker(config, mesh), tokenizer)
    if line := idle_remark(config, progress.iteration):
        tell(mesh, line)
    ending = None
    with MetricLog.from_config(config, rank=mesh.rank) as log:
        if config.training.do_train and data.train is not None:
            progress, ending = _train_on(parts, progress, log, signals)
        if data.test is not None and config.training.do_test and progress.iteration == config.training.train_iters:
            parts.evaluator("test", data.test).report(log, progress.iteration, 0)
    return Outcome(progress, status=ending.conclude(progress) if ending is not None else 0)


def _train_on(parts: _Parts, progress: Progress, log: MetricLog, signals: Signals) -> tuple[Progress, EarlyEnd]:
    """Train to the last iteration, or to where the run is asked to end; and what knows why it ended."""
    config, engine = parts.config, parts.engine
    assert parts.data.train is not None, "there are training data"
    left_out = LeftOut(config, parts.mesh)
    progress = left_out.begin(progress)
    last = last_iteration(config, progress.iteration)
    guards = Guards(engine, left_out, SkipLog(config, parts.mesh, parts.data.train))
    checkpoints = Checkpoints(engine, parts.schedule, last_iteration=last)
    ending = EarlyEnd(config, parts.mesh, signals, seconds_to_save=lambda: checkpoints.saver.seconds_to_save)
    # Compared first, as data are not to blame for what a corrupt rank made of them; judged next, then saved: no
    # checkpoint holds what is bad or corrupt.
    callbacks: list[Callback] = [
        NoteStep(),
        SignsOfLife(),
        Metrics(engine, log),
        *comparisons(engine),
        guards,
        *_measurements(parts, log, last),
        checkpoints,
        ending,
    ]
    run = Run(engine, parts.loader(progress), parts.batches, parts.schedule, last, ending, guards)
    rewinder = Rewinder(engine, guards, checkpoints.saver, log, parts.loader)
    progress = rewinder.train(run, progress, list(naming_stragglers(engine, log, callbacks)))
    checkpoints.saver.finish()
    return progress, ending


def _measurements(parts: _Parts, log: MetricLog, last: int) -> list[Callback]:
    """What is evaluated, watched and profiled on the way."""
    found: list[Callback] = []
    if parts.data.valid is not None and parts.config.training.do_valid:
        found.append(Evaluation(parts.evaluator("validation", parts.data.valid), log))
    return found + monitors(parts.engine, log, last_iteration=last) + profilers(parts.engine, log, last_iteration=last)


def with_iterations(config: Config) -> Config:
    """`config` with `train_epochs` turned into iterations; the datasets are built from the one before."""
    if config.training.train_iters is not None or config.training.train_epochs is None:
        return config
    return config.with_train_iters(train_iters_for_epochs(config))


def start_or_resume(config: Config, mesh: Mesh) -> tuple[Engine, Progress, LRSchedule]:
    """Build the engine from fresh weights, from a checkpoint's weights, or as a checkpoint's run left it.

    Raises:
        CheckpointError: if `load` or `save` cannot be used as asked.
    """
    origin = origin_of(config, thorough_check(mesh))
    lineage = agree_on_lineage(config, mesh, origin)
    for line in told(config, origin) if mesh.rank == 0 else ():
        tell(mesh, line)
    run = origin.run if origin else None
    schedule = agreed_schedule(config, run)
    weights = with_fresh_reward_head(weights_of(origin, config), config, origin)
    engine = build_engine(config, mesh, weights, build_objective(config, mesh, origin))
    engine.lineage = lineage
    return engine, resume_run(engine, run) if run else Progress(), schedule


def agreed_schedule(config: Config, run: RunReader | None) -> LRSchedule:
    """The configuration's schedule, or where a run is taken up its own, or both where they agree."""
    schedule = LRSchedule.from_config(config)
    if run is None:
        return schedule
    return schedule.reconcile(
        run.manifest.schedule,
        override_lr_scheduler=config.schedule.override_lr_scheduler,
        use_checkpoint_lr_scheduler=config.schedule.use_checkpoint_lr_scheduler,
    )


def build_engine(config: Config, mesh: Mesh, source: WeightSource, objective: Objective | None = None) -> Engine:
    """The engine that the layout asks for; without an objective it trains on the next token."""
    if config.parallel.pipeline_stages == 1:
        return PlainEngine(config, mesh, source, objective)
    from neox.training.pipeline import PipelineEngine

    return PipelineEngine(config, mesh, source)


def batch_maker(config: Config, mesh: Mesh) -> BatchMaker:
    """How a step's batch is made."""
    data = config.data
    end = build_tokenizer(config.tokenizer).eod if data.eod_mask_loss else None
    if config.preference.is_on:
        return ScoredBatchMaker(
            mesh,
            config.batch.gradient_accumulation_steps,
            mask_after=end,
            ramp=BatchRamp.from_config(config),
            mean_over_tokens=config.preference.train_impl == "reinforce",
        )
    return BatchMaker(
        mesh,
        config.batch.gradient_accumulation_steps,
        mask_after=end,
        curriculum=curriculum_of(config),
        ramp=BatchRamp.from_config(config),
    )


def train_loader(
    config: Config, mesh: Mesh, data: DatasetSplits, consumed: int, left_out: Ranges = ()
) -> Iterator[Batch]:
    """Micro-batches of this data-parallel rank from the first sample not yet consumed, without ranges of the order."""
    assert data.train is not None, "there are training data"
    workers = config.data.num_workers
    return micro_batches(data.train, config, mesh, start=consumed, left_out=left_out, num_workers=workers)


def idle_remark(config: Config, start: int) -> str:
    """Why a run that stands at iteration `start` trains no step; empty where it trains."""
    end = config.training.train_iters
    if not config.training.do_train:
        return f"nothing to train: do_train is false; the run is at iteration {start}"
    if end is not None and start >= end:
        return f"nothing to train: the run is at iteration {start}, and train_iters is {end}"
    return ""


def last_iteration(config: Config, start: int) -> int:
    """Where this process stops: the end of the run, or before it at the next multiple of `exit_interval`."""
    end = config.training.train_iters
    assert end is not None, "train_iters was resolved"
    interval = config.training.exit_interval
    return min(end, (start // interval + 1) * interval) if interval else end


def _coordinator(mesh: Mesh) -> Coordinator:
    return Coordinator(global_rank=mesh.rank, local_rank=mesh.local_rank, barrier=dist.barrier)


def cuda_device_count() -> int:
    """GPUs that this machine offers."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
