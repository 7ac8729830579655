"""Work that all ranks do together while training goes on."""

import threading
from collections.abc import Callable

import torch.distributed as dist

from neox.checkpoint.native.store import Team
from neox.parallel.mesh import Mesh
from neox.parallel.rendezvous import GROUP_TIMEOUT
from neox.training.team import team_of


class Background:
    """Does one piece of work at a time, in a thread of each rank.

    The threads talk over a process group of their own, on the CPU: training's is in use by the other thread. They are
    no daemons: a process that ends for whatever reason but a kill finishes the work first.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._team = team_of(mesh, dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT))
        self._main_team = team_of(mesh)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[Team], object]) -> None:
        """Begin a piece of work.

        Args:
            work: a collective of the team it is given; fails on all ranks if it fails with a UserError on one.
        """
        assert self._thread is None, "the work before it was waited for"

        def run() -> None:
            try:
                work(self._team)
            except BaseException as error:  # whatever it is, the main thread has to know
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the work is done; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def look(self) -> None:
        """Raise what the work raised, if it has ended on some rank; on all ranks at once. A collective."""
        if self._thread is None:
            return
        states = self._main_team.gather((self._thread.is_alive(), self._error is not None))
        if not any(is_alive for is_alive, _ in states) or any(has_failed for _, has_failed in states):
            self.wait()
