"""Going back to the newest checkpoint inside a running process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from neox.checkpoint.native.fallback import checkpoint_to_load
from neox.checkpoint.native.manifest import Progress
from neox.checkpoint.runs import open_run
from neox.errors import UserError
from neox.parallel.rng import seed_dropout
from neox.training.checkpoints import resume_run, set_scaler_state
from neox.training.engine import Engine
from neox.training.guards.guard import Guards
from neox.training.loop import Callback, Rewind, Run, training_loop
from neox.training.metrics.loggers import MetricLog
from neox.training.objectives.build import with_fresh_reward_head
from neox.training.origin import Origin, origin_of, weights_of
from neox.training.saving import Saver, scaler_state
from neox.training.state import forget_optimizer, overwrite_weights
from neox.training.team import tell, thorough_check
from neox.watch import phase

LoaderFrom = Callable[[Progress], Iterator[Mapping[str, torch.Tensor]]]


class Rewinder:
    """Trains, and goes back where a callback asks for it; the engine stays, everything in it is loaded anew."""

    def __init__(self, engine: Engine, guards: Guards, saver: Saver, log: MetricLog, loader_from: LoaderFrom) -> None:
        """Take what a run is made of, before its first step.

        Args:
            engine: what is trained.
            guards: know what is left out.
            saver: writes the checkpoints of this process.
            log: gets the number of rewinds.
            loader_from: makes the data loader of a run that stands there.
        """
        self.engine = engine
        self.guards = guards
        self.saver = saver
        self.log = log
        self.loader_from = loader_from
        self.rewinds = 0
        self._fresh_scaler = scaler_state(engine)
        self._since_save = 0
        self._saved: int | None = None

    def train(self, run: Run, progress: Progress, callbacks: Sequence[Callback]) -> Progress:
        """`training_loop`, begun again after each rewind.

        Raises:
            UserError: there were too many rewinds, or there is nothing whole to go back to.
        """
        while True:
            try:
                return training_loop(run, progress, callbacks)
            except Rewind as rewind:
                progress = self._go_back(rewind)
            run = replace(run, loader=self.loader_from(progress))

    @phase("rewinding")
    def _go_back(self, rewind: Rewind) -> Progress:
        """Load the newest whole checkpoint, and leave out what is to be left out from there on."""
        self.saver.finish()
        self._count(rewind)
        iteration = self.guards.iteration
        progress, left_out = self._load(), self.guards.left_out
        before, where = left_out.add(*progress.left_out), f"back to iteration {progress.iteration}"
        ranges = before
        if rewind.left_out is None:
            tell(self.engine.mesh, f"iteration {iteration}: {rewind.reason}; {where}")
        else:
            window = max(rewind.left_out[0], progress.consumed_samples), rewind.left_out[1]
            ranges = left_out.add(window)
            self.guards.log.record(iteration, rewind.reason, f"{where}, data left out", window, before)
        self.log.log(iteration, {"train/rewinds": self.rewinds})
        return replace(progress, left_out=ranges)

    def _count(self, rewind: Rewind) -> None:
        if self.saver.newest != self._saved:
            self._saved, self._since_save = self.saver.newest, 0
        most = self.engine.config.reliability.max_skips
        if self._since_save >= most:
            raise UserError(
                f"iteration {self.guards.iteration}: {rewind.reason}; went back {most} times without getting to a new "
                "checkpoint, and max_skips allows no more: go on from an earlier one, or with a lower learning rate"
            )
        self._since_save += 1
        self.rewinds += 1

    def _load(self) -> Progress:
        """Put weights, optimizer, loss scale and dropout stream where a checkpoint or the start of the run has them."""
        engine, config = self.engine, self.engine.config
        is_own = self.saver.newest is not None
        origin = self._own_checkpoint() if is_own else origin_of(config, thorough_check(engine.mesh))
        forget_optimizer(engine)
        overwrite_weights(engine, with_fresh_reward_head(weights_of(origin, config), config, origin))
        set_scaler_state(engine, self._fresh_scaler)
        if origin is None or origin.run is None:
            seed_dropout(config.training.seed, engine.mesh)
            return Progress()
        return resume_run(engine, origin.run, whole=is_own)

    def _own_checkpoint(self) -> Origin:
        """The newest one of this process that is whole.

        By the number that every rank knows: what `latest` names may reach some hosts of a network file system later.
        """
        settings, check = self.engine.config.checkpoint, thorough_check(self.engine.mesh)
        assert settings.save is not None, "a checkpoint was saved"
        folder = checkpoint_to_load(Path(settings.save), self.saver.newest, fallback=True, check=check)
        assert folder is not None, "a checkpoint was saved"
        run = open_run(folder)
        assert run is not None, "what was saved is a run"
        return Origin(run, run)
