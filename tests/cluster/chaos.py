"""A run under faults: what strikes it, what brings it back, and how long either takes."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hosts import NAMES, Cluster, wait_until

STEPS = 200
RANKS = 4
BATCH = 16
REQUEUE = 75
KINDS = ("kill", "kill", "link", "terminate all", "terminate launcher", "full disk", "nan", "nan", "flip", "flip")
SPARE_BYTES = 256 << 10
"""Left on a full disk: less than a checkpoint takes."""

_PATIENCE = 600.0


@dataclass
class Fault:
    """One thing that goes wrong, with times in seconds since 1970.

    Attributes:
        kind: one of KINDS.
        step: the iteration in which it strikes, or after which it is let loose.
        rank: whom it hits, where it hits one.
        struck: when it did.
        detected: of the line that names it.
        again: when the run was started again; for a process that goes on, the same as `detected`.
        went_on: of the first step after that.
    """

    kind: str
    step: int
    rank: int
    struck: float = 0.0
    detected: float = 0.0
    again: float = 0.0
    went_on: float = 0.0

    @property
    def place(self) -> int:
        """A sample that the step reads, in a run from which nothing was left out before."""
        return (self.step - 1) * BATCH + self.rank


def plan(seed: int) -> list[Fault]:
    """Ten faults in random order, at random steps, far enough apart for each to be seen by itself."""
    choice = random.Random(seed)
    kinds = choice.sample(KINDS, len(KINDS))
    return [Fault(kind, 12 + 17 * i + choice.randrange(8), choice.randrange(RANKS)) for i, kind in enumerate(kinds)]


@dataclass
class Keeper:
    """Starts a command, and starts it again whenever it ends with REQUEUE: what a scheduler does.

    Attributes:
        start: starts it.
        lines: what it printed, with the time at which each line came.
        starts: times at which it was started.
        status: of its end for good; None before.
    """

    start: Callable[[], "subprocess.Popen[str]"]
    lines: list[tuple[float, str]] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    process: "subprocess.Popen[str] | None" = None
    status: int | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        status = REQUEUE
        while status == REQUEUE:
            self.starts.append(time.time())
            self.process = self.start()
            assert self.process.stdout is not None
            for line in self.process.stdout:
                self.lines.append((time.time(), line.rstrip("\n")))
            status = self.process.wait()
        self.status = status

    def first(self, pattern: str, since: float) -> float | None:
        """When the first line after a moment came that matches."""
        return next((at for at, line in list(self.lines) if at >= since and re.search(pattern, line)), None)

    def wait_for(self, pattern: str, since: float) -> float:
        """Wait for such a line."""
        self.wait_until(lambda: self.first(pattern, since) is not None, f"a line like {pattern!r}")
        found = self.first(pattern, since)
        assert found is not None
        return found

    def wait_for_start(self, since: float) -> float:
        """Wait for the next start after a moment."""
        self.wait_until(lambda: self.starts[-1] > since, "a new start")
        return self.starts[-1]

    def wait_until(self, happened: Callable[[], bool], what: str) -> None:
        """Wait for something that the run is to come to."""
        wait_until(lambda: happened() or self.status is not None, f"{what} in\n{self.tail()}\n", _PATIENCE)
        assert happened(), f"ended with {self.status} before {what}:\n{self.tail()}"

    def finish(self) -> None:
        """Wait for the end for good."""
        wait_until(lambda: self.status is not None, f"the end of\n{self.tail()}\n", _PATIENCE)

    def tail(self) -> str:
        """The last lines, without those of steps."""
        return "\n".join([line for _, line in self.lines if "samples/sec" not in line][-80:])


class Chaos:
    """Lets faults loose on a run, one after the other, and times what follows."""

    def __init__(self, made: Cluster, keeper: Keeper, *, script: str, save: Path, faults: Path) -> None:
        self.made = made
        self.keeper = keeper
        self.script = script
        self.save = save
        self.faults = faults

    def inflict(self, fault: Fault) -> None:
        """Strike, wait until it is noticed, mend what only the world can mend, wait for the next step."""
        strike = {
            "kill": self._kill,
            "link": self._cut_link,
            "terminate all": self._terminate_all,
            "terminate launcher": self._terminate_launcher,
            "full disk": self._fill_disk,
            "nan": self._await_nan,
            "flip": self._flip,
        }[fault.kind]
        self.wait_for_step(fault.step - (fault.kind == "nan"))
        fault.struck = time.time()
        strike(fault)
        self._wait_for_record(fault)

    def wait_for_step(self, step: int) -> None:
        """Wait until so many steps are done."""
        self.keeper.wait_until(lambda: max(self._steps(0.0), default=0) >= step, f"step {step}")

    def _wait_for_record(self, fault: Fault) -> None:
        self.keeper.wait_until(lambda: bool(self._times(fault.again)), f"a step after {fault.kind}")
        fault.went_on = min(self._times(fault.again))

    def _records(self) -> list[dict[str, float]]:
        path = self.save / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = []
        for line in lines:
            with contextlib.suppress(ValueError):  # half written
                records.append(json.loads(line))
        return [record for record in records if "train/lm_loss" in record]

    def _steps(self, since: float) -> list[int]:
        return [int(record["step"]) for record in self._records() if record["time"] >= since]

    def _times(self, since: float) -> list[float]:
        return [record["time"] for record in self._records() if record["time"] > since]

    def _kill(self, fault: Fault) -> None:
        os.kill(self.ranks()[fault.rank], signal.SIGKILL)
        self._await_restart(fault, rf"rank {fault.rank}\b.* is gone")

    def _cut_link(self, fault: Fault) -> None:
        self.made.set_link("n2", "down")
        try:
            fault.detected = self.keeper.wait_for(r"rank \d \(host n2.*has not answered", fault.struck)
        finally:
            self.made.set_link("n2", "up")
        self._await_restart(fault, r"rank \d \(host n2.*has not answered")

    def _await_restart(self, fault: Fault, pattern: str) -> None:
        fault.detected = self.keeper.wait_for(pattern, fault.struck)
        fault.again = self.keeper.wait_for(r"restart \d+ of \d+", fault.detected)

    def _terminate_all(self, fault: Fault) -> None:
        for process in self.ranks().values():
            os.kill(process, signal.SIGTERM)
        self._await_requeue(fault)

    def _terminate_launcher(self, fault: Fault) -> None:
        assert self.keeper.process is not None
        self.keeper.process.send_signal(signal.SIGTERM)
        self._await_requeue(fault)

    def _await_requeue(self, fault: Fault) -> None:
        fault.detected = self.keeper.wait_for("SIGTERM: ended after iteration", fault.struck)
        fault.again = self.keeper.wait_for_start(fault.detected)

    def _fill_disk(self, fault: Fault) -> None:
        ballast, pattern = self.save.parent / "ballast", "No space left on device.*trying again"

        def is_noticed() -> bool:
            # Again and again, as checkpoints that go make room.
            disk = os.statvfs(self.save.parent)
            # A checkpoint that is being written may take the room meanwhile, and is refused then too.
            with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
                file.write(bytes(max(0, disk.f_bavail * disk.f_frsize - SPARE_BYTES)))
            return self.keeper.first(pattern, fault.struck) is not None

        try:
            self.keeper.wait_until(is_noticed, "a save that failed")
        finally:
            ballast.unlink()
        fault.detected = fault.again = self.keeper.wait_for(pattern, fault.struck)

    def _await_nan(self, fault: Fault) -> None:
        done = self.faults / f"poison-{fault.place}.done"
        self.keeper.wait_until(done.exists, f"the NaN of step {fault.step}")
        fault.struck = done.stat().st_mtime
        fault.detected = fault.again = self.keeper.wait_for("update left out, and the batch", fault.struck)

    def _flip(self, fault: Fault) -> None:
        (self.faults / "flip.new").write_text(json.dumps({"rank": fault.rank, "seed": fault.step}))
        (self.faults / "flip.new").rename(self.faults / "flip.json")
        done = self.faults / "flip.done"
        self.keeper.wait_until(done.exists, "the flip")
        fault.struck = time.time()
        fault.detected = fault.again = self.keeper.wait_for(r"differ.*back to iteration", fault.struck)
        done.unlink()

    def ranks(self) -> dict[int, int]:
        """Processes of the run by rank."""
        found = {}
        for process, variables in self._processes():
            rank = re.search(rb"\0RANK=(\d+)\0", variables)
            if rank:
                found[int(rank[1])] = process
        assert set(found) == set(range(RANKS)), f"ranks that run: {sorted(found)}"
        return found

    def _processes(self) -> list[tuple[int, bytes]]:
        """Processes of the run on both hosts, with their environments."""
        found = []
        for host in NAMES:
            command = ["ip", "netns", "pids", self.made.namespace(host)]
            for pid in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    if self.script.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                        found.append((int(pid), b"\0" + Path(f"/proc/{pid}/environ").read_bytes()))
        return found

    def end(self) -> None:
        """Leave nothing of the run behind."""
        for process, _ in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def table(faults: Sequence[Fault]) -> str:
    """Seconds by kind of fault."""
    rows = [f"{'fault':20}{'strikes at':>12}{'to detection':>14}{'restart to first step':>24}"]
    for fault in faults:
        whose = f"{fault.kind} (rank {fault.rank})" if fault.kind in ("kill", "flip") else fault.kind
        noticed, went_on = fault.detected - fault.struck, fault.went_on - fault.again
        rows.append(f"{whose:20}{f'step {fault.step}':>12}{f'{noticed:.1f} s':>14}{f'{went_on:.1f} s':>24}")
    return "\n".join(rows)
