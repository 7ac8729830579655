"""What this process last did together with others: a record of its collectives, for who waits for whom and how long."""

import functools
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.compiler import is_compiling
from torch.distributed import distributed_c10d as c10d

_OF_A_GROUP = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
)
_OF_A_PAIR = {"send": "dst", "isend": "dst", "recv": "src", "irecv": "src"}

_MARK = "_of_collective"
"""Attribute of exceptions that came out of one."""

Channel = tuple[str, int | None]
"""("send" or "recv", the other rank); None for a receiver that takes from anyone."""


@dataclass(slots=True)
class Record:
    """The collectives of one thread, so far.

    Attributes:
        name: function last called, `all_reduce` say; "" before the first.
        where: its process group (None: all ranks), or the channel of a message.
        elements: of the tensor it was given; 0 where it was given none.
        inside: whether it has not returned yet.
        since: `time.monotonic()` when it began, or when it returned.
        calls: number of them.
        seconds: spent inside of those that returned.
        started: how many were begun, by group or channel.
        failed: whether the last one raised.
        stack: file, line and function of each call around the last one that raised, the outermost first.
        is_of_step: whether the thread works on the step: the main thread, or one of autograd's, which run the
            backward pass on a GPU; other threads write checkpoints.
    """

    name: str = ""
    where: Any = None
    elements: int = 0
    inside: bool = False
    since: float = 0.0
    calls: int = 0
    seconds: float = 0.0
    started: dict[Any, int] = field(default_factory=dict)
    failed: bool = False
    stack: Sequence[tuple[str, int, str]] = ()
    is_of_step: bool = True

    def begin(self, name: str, where: Any, elements: int) -> None:
        """One is called."""
        self.name, self.where, self.elements = name, where, elements
        self.started[where] = self.started.get(where, 0) + 1
        self.calls += 1
        self.enter()

    def enter(self) -> None:
        """It is called, or waited for."""
        self.since, self.inside, self.failed = time.monotonic(), True, False
        if _observer is not None:
            _observer()

    def fail(self, error: BaseException) -> None:
        """It raised; where, is kept, as the exception leaves the calls around it."""
        self.failed, self.stack = True, stack_of(sys._getframe(1))
        if not _is_of_a_loader(error):
            setattr(error, _MARK, self.name)

    def end(self) -> None:
        """It has returned."""
        now = time.monotonic()
        self.seconds += now - self.since
        self.since, self.inside = now, False
        if _observer is not None:
            _observer()


def stack_of(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """File, line and function of a call and of those around it, the outermost first."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname))
        frame = frame.f_back
    return found[::-1]


_records: dict[int, Record] = {}
"""By thread."""

_observer: Callable[[], None] | None = None


def observe_collectives(observer: Callable[[], None] | None) -> None:
    """Have `observer` called, in the thread that calls them, when collectives begin and when they return."""
    global _observer  # noqa: PLW0603
    _observer = observer


def record_collectives() -> None:
    """Have torch's collectives note what they do; before libraries take references to them.

    A note costs about a microsecond. Code that `torch.compile` traces calls the functions as they were. What a call
    with `async_op` leaves running is not waited for here: its time is in `seconds` only as far as `wait()` takes.
    Calling it again begins a new record.
    """
    _records.clear()
    if hasattr(c10d.all_reduce, "__wrapped__") and c10d.all_reduce.__module__ == __name__:
        return
    # Tells torch.compile which functions it may put into a graph; it must know them as they were.
    import torch.distributed._functional_collectives  # noqa: F401

    for name in (*_OF_A_GROUP, *_OF_A_PAIR):
        original = getattr(c10d, name)
        recorded = _recorded(name, original)
        setattr(c10d, name, recorded)
        if getattr(dist, name, None) is original:
            setattr(dist, name, recorded)
    dist.Work.wait = _recorded_wait(dist.Work.wait)  # type: ignore[method-assign]


def _recorded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    parameters = list(inspect.signature(original).parameters)
    where_of = _channel_finder(name, parameters) if name in _OF_A_PAIR else _group_finder(parameters)

    @functools.wraps(original)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return original(*args, **kwargs)
        record = own_record()
        if record.inside:  # one that calls another
            return original(*args, **kwargs)
        record.begin(name, where_of(args, kwargs), _elements(args, kwargs))
        try:
            return original(*args, **kwargs)
        except BaseException as error:
            record.fail(error)
            raise
        finally:
            record.end()

    recorded.__module__ = __name__
    return recorded


def _recorded_wait(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return original(work, *args, **kwargs)
        record = own_record()
        if record.inside:
            return original(work, *args, **kwargs)
        record.enter()
        try:
            return original(work, *args, **kwargs)
        except BaseException as error:
            record.fail(error)
            raise
        finally:
            record.end()

    return wait


def own_record() -> Record:
    """The record of the calling thread."""
    thread = threading.get_ident()
    record = _records.get(thread)
    if record is None:
        current = threading.current_thread()
        is_of_step = current is threading.main_thread() or isinstance(current, threading._DummyThread)
        record = _records[thread] = Record(is_of_step=is_of_step)
    return record


def records() -> dict[int, Record]:
    """The records of all threads, by number of the thread."""
    return dict(_records)


def last_record() -> Record:
    """Of the threads that work on the step the one that is inside a collective, or was last."""
    found = [record for record in list(_records.values()) if record.is_of_step]
    return max(found, key=lambda record: (record.inside, record.since), default=Record())


def seconds_waited() -> float:
    """Seconds that the step's threads have spent in collectives since this process joined the group.

    With NCCL a collective returns when it is queued, and this is the host's time only.
    """
    return sum(record.seconds for record in list(_records.values()) if record.is_of_step)


def _is_of_a_loader(error: BaseException) -> bool:
    """Whether torch says by it that a process that reads data has died, which it does wherever the main thread is."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and "/torch/utils/data/" in traceback.tb_frame.f_code.co_filename


def raised_by_collective(error: BaseException) -> bool:
    """Whether an exception, or one that led to it, came out of a collective."""
    return any(hasattr(cause, _MARK) or isinstance(cause, dist.DistError) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _group_finder(parameters: list[str]) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    position = parameters.index("group")

    def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[position] if len(args) > position else kwargs.get("group")

    return find


def _channel_finder(name: str, parameters: list[str]) -> Callable[[tuple[Any, ...], dict[str, Any]], Channel]:
    peer, position, group_at = _OF_A_PAIR[name], parameters.index(_OF_A_PAIR[name]), parameters.index("group")

    def find(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Channel:
        rank = args[position] if len(args) > position else kwargs.get(peer)
        if rank is None and kwargs.get(f"group_{peer}") is not None:
            group = args[group_at] if len(args) > group_at else kwargs.get("group")
            rank = dist.get_global_rank(group or c10d._get_default_group(), kwargs[f"group_{peer}"])
        return name.removeprefix("i"), rank

    return find


def _elements(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for argument in args or kwargs.values():
        if isinstance(argument, torch.Tensor):
            return argument.numel()
    return 0
