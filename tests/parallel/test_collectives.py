"""The record of collectives: what was called last, how often, how long; and how processes meet."""

import errno
import os
import resource
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks

from neox.errors import LaunchError
from neox.parallel import collectives
from neox.parallel.rendezvous import GROUP_TIMEOUT, join_world, wait_long


def call_collectives() -> dict[str, Any]:
    """Call one of each kind; return what the record says after each."""
    join_world("gloo", timedelta(seconds=60))
    wait_long()
    rank = dist.get_rank()
    record = collectives.own_record()
    found: dict[str, Any] = {}

    def note(what: str) -> None:
        found[what] = (record.name, record.elements, record.calls, record.inside)

    pair = dist.new_group([0, 1])
    numbers = torch.full((4,), float(rank))
    dist.all_reduce(numbers)
    note("all_reduce")
    dist.all_reduce(tensor=numbers, group=pair, async_op=True).wait()
    note("of a group, by keyword, waited for")
    dist.all_gather_object([None, None], "x")
    note("one that calls others")
    other = torch.zeros(3)
    messages = [dist.P2POp(dist.isend, numbers[:3], 1 - rank), dist.P2POp(dist.irecv, other, 1 - rank)]
    for request in dist.batch_isend_irecv(messages):
        request.wait()
    found["sum"], found["message"] = numbers.tolist(), other.tolist()
    found["begun"] = {key: count for key, count in record.started.items() if not isinstance(key, dist.ProcessGroup)}
    found["of the pair"] = record.started[pair]
    found["seconds"] = collectives.seconds_waited()

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y

    before = record.calls
    found["compiled"] = (compiled(torch.ones(2)).tolist(), record.calls - before)
    try:
        dist.broadcast(numbers, src=7)
    except (RuntimeError, ValueError) as error:
        found["raised"] = (record.failed, collectives.raised_by_collective(error))
    found["another"] = collectives.raised_by_collective(ValueError("not of a collective"))
    found["timeout"] = pair._get_backend(torch.device("cpu")).options._timeout
    return found


def test_the_record() -> None:
    for rank, found in enumerate(run_ranks(call_collectives, 2)):
        assert found["all_reduce"] == ("all_reduce", 4, 1, False)
        assert found["of a group, by keyword, waited for"] == ("all_reduce", 4, 2, False)
        assert found["one that calls others"] == ("all_gather_object", 0, 3, False)
        assert found["sum"] == [2.0] * 4
        assert found["message"] == [2.0] * 3
        assert found["begun"] == {None: 2, ("send", 1 - rank): 1, ("recv", 1 - rank): 1}
        assert found["of the pair"] == 1
        assert found["seconds"] > 0.0
        assert found["compiled"] == ([4.0, 4.0], 0)
        assert found["raised"] == (True, True)
        assert not found["another"]
        assert found["timeout"] == GROUP_TIMEOUT


def come_to_a_meeting_of_three(folder: Path, seconds: int) -> str:
    """The first comes when the second is there, and keeps the store until that one has read it."""
    os.environ["WORLD_SIZE"] = "3"
    is_first, coming, gone = os.environ["RANK"] == "0", folder / "coming", folder / "gone"
    while is_first and not coming.exists():
        time.sleep(0.01)
    coming.touch()
    try:
        join_world("gloo", timedelta(seconds=seconds))
    except LaunchError as error:
        if not is_first:
            gone.touch()
        while not gone.exists():
            time.sleep(0.01)
        return str(error)
    return "all came"


def join_with_few_files() -> int:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    join_world("gloo", timedelta(seconds=60))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_a_rank_may_hold_a_connection_to_each_of_thousands() -> None:
    most = min(1 << 16, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert run_ranks(join_with_few_files, 1) == [most]


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    for line in run_ranks(come_to_a_meeting_of_three, 2, tmp_path, 4):
        assert "after 4 s (distributed_timeout) 2 of 3 ranks came; absent: 2; what they printed may say why" in line


def come_without_the_first(folder: Path) -> str:
    return "" if os.environ["RANK"] == "0" else come_to_a_meeting_of_three(folder, 1)


def test_the_first_does_not_come(tmp_path: Path) -> None:
    line = run_ranks(come_without_the_first, 2, tmp_path)[1]
    assert f"after 1 s (distributed_timeout) rank 0 was not there: {os.strerror(errno.ECONNREFUSED)}" in line
