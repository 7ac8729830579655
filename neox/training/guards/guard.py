"""Bad steps during training: judged, left out, remembered, and told."""

from collections import deque
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from neox.checkpoint.native.manifest import Progress
from neox.data.order import Ranges, advance, merged, read_places
from neox.errors import UserError
from neox.training.engine import Engine
from neox.training.guards.left_out import LeftOut
from neox.training.guards.record import SkipLog
from neox.training.guards.rules import Finding, Rules
from neox.training.guards.updates import guard_updates
from neox.training.loop import Rewind, Step
from neox.training.saving import is_save_point

_WAY_ON = (
    "no checkpoint was saved since: go on from the last one with a lower learning rate or a smaller gradient_clipping, "
    "or with another action"
)


@dataclass(frozen=True)
class _Seen:
    """A step, to be judged later."""

    iteration: int
    samples: tuple[int, int]
    loss: torch.Tensor
    norm: torch.Tensor | float | None


class Guards:
    """Judges every step: before its update where the configuration has a use for that, else before the next report.

    As a callback it stands before the one that saves, and acts: no checkpoint is made of weights that took a bad step.
    """

    def __init__(self, engine: Engine, left_out: LeftOut, log: SkipLog) -> None:
        """Take an engine that is ready to train; call on all ranks.

        Args:
            engine: whose updates are guarded.
            left_out: the data that are passed over.
            log: what is told of each step that is left out.
        """
        self.engine = engine
        self.config = engine.config
        self.settings = engine.config.reliability
        self.left_out = left_out
        self.log = log
        is_fp16 = engine.loss_scale is not None
        self.rules = Rules(self.settings, loss_scaler=engine.deepspeed.optimizer.loss_scaler if is_fp16 else None)
        self.iteration = 0
        self._loss = 0.0
        self._finding: Finding | None = None
        self._in_a_row = 0
        self._samples = (0, 0)
        self._passed_over: Ranges = ()
        self._starts: deque[int] = deque(maxlen=self.settings.rewind_window + 1)
        self._unjudged: list[_Seen] = []
        if self.rules.need_every_loss:
            guard_updates(engine, self._is_left_out)

    def before_training(self, progress: Progress) -> None:
        """Go on from there, for the first time or after a rewind."""
        self.rules.begin(progress.recent_losses)
        self.iteration, self._in_a_row, self._finding = progress.iteration, 0, None
        self._starts.clear()
        self._unjudged.clear()

    def remember(self, before: Progress, after: Progress, tokens: torch.Tensor) -> Progress:
        """Add to where the run stands after a step what it has to remember of it; see `loop.Memory`."""
        self.iteration = after.iteration
        self._passed_over = before.left_out
        self._samples = next(read_places(before.consumed_samples, before.left_out)), after.consumed_samples
        self._starts.append(self._samples[0])
        is_updated = self._finding is None and not self.engine.skipped_last_step
        # Without a labelled token the loss, 0, says nothing about usual losses.
        if is_updated and self.rules.need_every_loss and tokens > 0:
            self.rules.note(self._loss)
        left_out = self.left_out.ranges
        if self._leaves_batch_out():
            left_out = merged([*left_out, self._samples])
        return replace(after, left_out=left_out, recent_losses=list(self.rules.recent))

    def after_step(self, step: Step) -> None:
        """Do what is to be done about a bad step.

        Raises:
            Rewind: go back.
            UserError: it ends the run.
        """
        if not self.rules.need_every_loss:
            self._judge_late(step)
        elif self._finding is not None:
            self._act(self._finding, step)
        elif not step.skipped:
            self._in_a_row = 0

    def _is_left_out(self, loss: float, norm: float) -> bool:
        self._loss = loss
        self._finding = self.rules.judge(loss, norm)
        return self._finding is not None

    def _leaves_batch_out(self) -> bool:
        return self._finding is not None and self._finding.action == "skip_batch" and not self._is_too_many()

    def _is_too_many(self) -> bool:
        return self._in_a_row >= self.settings.max_skips

    def _act(self, finding: Finding, step: Step) -> None:
        if finding.action == "stop":
            raise self._end(self.iteration, self._samples, str(finding))
        if finding.action == "rewind":
            end = advance(self._samples[1], self.settings.rewind_window * step.samples, self.left_out.ranges)
            raise Rewind(str(finding), left_out=(self._starts[0], end))
        if self._is_too_many():
            steps = f"the {self._in_a_row} steps before it were left out too, and max_skips allows no more"
            raise self._end(self.iteration, self._samples, f"{finding}; {steps}")
        if self._leaves_batch_out():
            self.left_out.add(self._samples)
        self._in_a_row += 1
        done = "update left out" if finding.action == "skip" else "update left out, and the batch from now on"
        self.log.record(self.iteration, str(finding), done, self._samples, self._passed_over)

    def _judge_late(self, step: Step) -> None:
        """Without any action but to stop, losses stay on the device until a report or a save is due."""
        iteration = step.progress.iteration
        self._unjudged.append(_Seen(iteration, self._samples, step.loss, step.gradient_norm))
        is_report = iteration % self.config.logging.log_interval == 0
        if not (is_report or step.is_last or is_save_point(self.config, iteration)):
            return
        seen, self._unjudged = self._unjudged, []
        for one, (loss, norm) in zip(seen, _figures(seen), strict=True):
            finding = self.rules.judge(loss, norm)
            if finding is not None:
                raise self._end(one.iteration, one.samples, str(finding))

    def _end(self, iteration: int, samples: tuple[int, int], what: str) -> UserError:
        return UserError(f"iteration {iteration}: {what}; samples {samples[0]} to {samples[1] - 1}; {_WAY_ON}")


def _figures(seen: list[_Seen]) -> list[tuple[float, float]]:
    """Sums over all ranks of the loss and the norm of each step, with one wait for the device.

    A sum is finite where it is on every rank, so all ranks judge alike, also where only one has gone wrong.
    """
    device = seen[0].loss.device
    norms = [torch.as_tensor(0.0 if one.norm is None else one.norm, device=device) for one in seen]
    figures = torch.stack((torch.stack([one.loss for one in seen]).float(), torch.stack(norms).float()))
    dist.all_reduce(figures)
    losses, numbers = figures.tolist()
    return list(zip(losses, numbers, strict=True))
