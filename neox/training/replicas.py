"""Comparing what several ranks hold copies of, so that a flipped bit is found, and the rank that has it named."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from neox.checkpoint.native.manifest import Progress
from neox.config import Config
from neox.errors import CorruptionError
from neox.parallel.mesh import Mesh
from neox.training.copies import Among, Difference, Prints, all_agree, differences, prints_of
from neox.training.engine import Engine
from neox.training.loop import Callback, Rewind, Step
from neox.training.saving import is_save_point, is_saved_after

_MOST_NAMED = 8


@dataclass(frozen=True)
class Found:
    """Fingerprints of one moment.

    Attributes:
        iteration: the step they were taken in or after.
        prints: of this rank.
    """

    iteration: int
    prints: Prints


class Replicas:
    """Compares copies every `replica_check_interval` steps, and before every save.

    The regular comparison is of the copies that a step was computed with: fingerprints are taken when its gradients are
    there, before the update, which above ZeRO 0 makes new copies out of the masters and hides what was wrong. Before a
    save it is what will be saved. Ranks exchange one sum for each kind of copies, and everything else only after a
    difference.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.config: Config = engine.config
        self.mesh: Mesh = engine.mesh
        self.interval = self.config.reliability.replica_check_interval
        self.rewinds = self.config.reliability.on_replica_mismatch == "rewind"
        self._is_due = False
        self._before_update: Prints | None = None
        engine.watch_gradients(self._take)

    def before_training(self, progress: Progress) -> None:
        """Compare what was loaded, where it is saved at once."""
        self._before_update = None
        self._plan(progress)
        if progress.iteration == 0 and is_save_point(self.config, 0):
            self._compare([Found(0, prints_of(self.engine))])

    def after_step(self, step: Step) -> None:
        """Compare when due.

        Raises:
            CorruptionError: on all ranks, if copies differ and the run is to stop.
            Rewind: likewise, if it is to go back.
        """
        iteration = step.progress.iteration
        due = []
        if self._before_update is not None:
            due.append(Found(iteration, self._before_update))
        if is_saved_after(self.config, iteration, is_last=step.is_last):
            due.append(Found(iteration, prints_of(self.engine)))
        self._before_update = None
        self._plan(step.progress)
        if due:
            self._compare(due)

    def _plan(self, progress: Progress) -> None:
        self._is_due = (progress.iteration + 1) % self.interval == 0

    def _take(self) -> None:
        if self._is_due:
            self._before_update = prints_of(self.engine)

    def _compare(self, found: list[Found]) -> None:
        sums = torch.stack([one.prints.sums for one in found])
        everyone = [torch.empty_like(sums) for _ in range(self.mesh.world_size)]
        dist.all_gather(everyone, sums)
        tables = torch.stack(everyone, dim=1).tolist()  # waits for the device
        is_stage_3 = self.config.parallel.zero_stage == 3
        for one, table in zip(found, tables, strict=True):
            if not all_agree(table, self.mesh, masters_are_whole=is_stage_3):
                self._name(one)

    def _name(self, found: Found) -> None:
        """Exchange the fingerprints of everything, and say what is wrong."""
        values = found.prints.prints.tolist()
        report = [(key, among.value, value) for (key, among), value in zip(found.prints.things, values, strict=True)]
        everyone: list[tuple[str, list[tuple[str, int, int]]]] = [("", [])] * self.mesh.world_size
        dist.all_gather_object(everyone, (socket.gethostname(), report))
        reports = [[(key, Among(among), value) for key, among, value in report] for _, report in everyone]
        reason = sentence(differences(reports, self.mesh), [host for host, _ in everyone])
        if self.rewinds:
            raise Rewind(reason)
        raise CorruptionError(
            f"iteration {found.iteration}: {reason}; start again from the newest checkpoint, and have the memory of "
            "that host and its GPU tested"
        )


def comparisons(engine: Engine) -> list[Callback]:
    """What compares copies in a run, where `replica_check_interval` asks for it."""
    return [Replicas(engine)] if engine.config.reliability.replica_check_interval else []


def sentence(found: list[Difference], hosts: list[str]) -> str:
    """What differs, in one line.

    Args:
        found: the clearest case first.
        hosts: of every rank.
    """
    assert found, "where sums differ, some tensor does"
    first, others = found[0], len(found) - 1
    more = f", and in {others} other tensor{'s' * (others > 1)}" if others else ""
    ranks = list(_with_hosts(first.suspects, hosts))
    if first.is_certain:
        whom = f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {_joined(ranks)} differ"
        return f"{whom} from the other copies ({first.copies} in all) in {first.what}{more}"
    if len(ranks) == 1:
        return (
            f"rank {ranks[0]} has weights and masters that differ in {first.what}{more}; nothing tells which are right"
        )
    return f"ranks {_joined(ranks)} differ in {first.what}{more}; {first.copies} copies cannot tell which one is right"


def _with_hosts(ranks: tuple[int, ...], hosts: list[str]) -> Iterator[str]:
    for rank in ranks[:_MOST_NAMED]:
        yield f"{rank} (on {hosts[rank]})"
    if len(ranks) > _MOST_NAMED:
        yield f"{len(ranks) - _MOST_NAMED} more"


def _joined(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
