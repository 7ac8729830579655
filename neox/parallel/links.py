"""The network between hosts, measured: is an all-reduce right, how fast is it, and how fast is every link.

Run as the ranks of all hosts by `python -m neox.launch check`; rank 0 prints one line of JSON. Hosts are paired as in
a tournament, so that in every round each host talks with one other; rank i of a host talks with rank i of the other.
"""

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from neox.errors import LaunchError
from neox.results import print_result

HOST_NAME = "NEOX_HOST"
"""Variable that holds this host's name in the list of hosts."""

ANSWER = "neox-answer "
"""Start of the line that holds the answer."""

_REPEATS = 3
_MEGABYTE = 1 << 20


def tournament(hosts: int) -> Iterator[list[tuple[int, int]]]:
    """Rounds in which every host meets every other once (the circle method); an odd one out rests."""
    ring: list[int | None] = [*range(hosts), *([None] if hosts % 2 else [])]
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        ring = [ring[0], ring[-1], *ring[1:-1]]


def measure(size: int, *, most_rounds: int, device: torch.device) -> dict[str, Any]:
    """Measure in every rank of the default group; rank 0 gets the figures, the others an empty mapping.

    Args:
        size: bytes of a message.
        most_rounds: rounds of the tournament, each a link per host.
        device: where messages lie.

    Returns:
        `reduce` (whether the sum was right in all ranks, bytes per second), `links` (two host names, the ranks'
        number on their hosts, bytes per second in both directions together), `library`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    names: list[str] = [""] * world
    dist.all_gather_object(names, host_name())
    hosts = list(dict.fromkeys(names))
    ranks = {host: [r for r in range(world) if names[r] == host] for host in hosts}
    right, speed = _all_reduce(size, device)
    links = []
    for number, pairs in enumerate(tournament(len(hosts))):
        if number == most_rounds:
            break
        for a, b in pairs:
            for slot, both in enumerate(zip(ranks[hosts[a]], ranks[hosts[b]], strict=False)):
                if rank in both:
                    rate = _exchange(sum(both) - rank, size, device, between=(hosts[a], hosts[b]))
                    links += [(hosts[a], hosts[b], slot, rate)] if rank == both[0] else []
        dist.barrier()
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (right, speed, links))
    if rank > 0:
        return {}
    return {
        "library": dist.get_backend(),
        "reduce": {"right": all(one[0] for one in gathered), "rate": min(one[1] for one in gathered)},
        "links": [link for one in gathered for link in one[2]],
    }


def host_name() -> str:
    """This host as the list of hosts names it."""
    return os.environ.get(HOST_NAME) or socket.gethostname()


def _all_reduce(size: int, device: torch.device) -> tuple[bool, float]:
    """Whether the sum over ranks is right, and bytes per second through the slowest link of a ring."""
    rank, world = dist.get_rank(), dist.get_world_size()
    expected = world * (world + 1) // 2
    slowest, right = 0.0, True
    for _ in range(_REPEATS):
        message = torch.full((size // 4,), float(rank + 1), device=device)
        _wait(device)
        start = time.monotonic()
        dist.all_reduce(message)
        _wait(device)
        slowest = time.monotonic() - start  # the first round also opens connections; the last counts
        right = right and bool((message == expected).all())
    return right, 2 * (world - 1) / world * size / max(slowest, 1e-9)


def _exchange(other: int, size: int, device: torch.device, *, between: tuple[str, str]) -> float:
    """Bytes per second of messages to and from another rank, both ways together; 0 if they arrive wrong.

    Raises:
        LaunchError: nothing arrives.
    """
    sent = torch.full((size // 4,), float(dist.get_rank()), device=device)
    received = torch.empty_like(sent)
    best = 0.0
    for _ in range(_REPEATS):
        _wait(device)
        start = time.monotonic()
        operations = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
        try:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
            _wait(device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise LaunchError(f"link {between[0]} - {between[1]}: no message comes through ({reason})") from None
        best = max(best, 2 * size / max(time.monotonic() - start, 1e-9))
    return best if bool((received == other).all()) else 0.0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: list[str]) -> int:
    """Join the group that torch's variables describe, measure, and print what was found."""
    parser = argparse.ArgumentParser(prog="neox.parallel.links")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS")
    options = parser.parse_args(argv)
    device = _own_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=options.timeout))
    except (dist.DistError, RuntimeError) as error:
        raise LaunchError(f"{host_name()}: the ranks do not meet ({str(error).splitlines()[0]})") from None
    found = measure(options.megabytes * _MEGABYTE, most_rounds=options.rounds, device=device)
    if found:
        print_result(ANSWER + json.dumps(found), flush=True)
    dist.destroy_process_group()
    return 0


def _own_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
