"""The measurement of links, by ranks that pretend to be several hosts; and hosts that run different code."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from neox.errors import LaunchError
from neox.parallel import agreement
from neox.parallel.agreement import agree_on_software
from neox.parallel.links import HOST_NAME, measure, tournament


@pytest.mark.parametrize("hosts", [2, 3, 4, 7, 8])
def test_everybody_meets_everybody_once(hosts: int) -> None:
    rounds = list(tournament(hosts))
    met = [pair for pairs in rounds for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(hosts) for b in range(a + 1, hosts)]
    for pairs in rounds:
        busy = [host for pair in pairs for host in pair]
        assert len(busy) == len(set(busy))


def test_one_host_meets_nobody() -> None:
    assert [pair for pairs in tournament(1) for pair in pairs] == []


def measured(hosts: list[str], rounds: int) -> dict[str, Any]:
    os.environ[HOST_NAME] = hosts[int(os.environ["RANK"])]
    dist.init_process_group("gloo")
    found = measure(1 << 16, most_rounds=rounds, device=torch.device("cpu"))
    dist.destroy_process_group()
    return found


def test_three_hosts_of_which_one_has_two_ranks() -> None:
    first, *rest = run_ranks(measured, 4, ["a", "a", "b", "c"], 16)
    assert rest == [{}, {}, {}]
    assert first["library"] == "gloo"
    assert first["reduce"]["right"] is True
    assert first["reduce"]["rate"] > 0
    assert sorted((one, other, slot) for one, other, slot, _ in first["links"]) == [
        ("a", "b", 0),
        ("a", "c", 0),
        ("b", "c", 0),
    ]
    assert all(rate > 0 for *_, rate in first["links"])


def test_slots_have_links_of_their_own_and_rounds_an_end() -> None:
    first = run_ranks(measured, 4, ["a", "a", "b", "b"], 16)[0]
    assert sorted((one, other, slot) for one, other, slot, _ in first["links"]) == [("a", "b", 0), ("a", "b", 1)]
    assert run_ranks(measured, 4, ["a", "b", "c", "d"], 1)[0]["links"].__len__() == 2


def agree(versions: list[str], *, one_host: bool) -> str:
    rank = int(os.environ["RANK"])
    if not one_host:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    dist.init_process_group("gloo")
    agreement.software = lambda: {"torch": versions[rank], "python": "3.11"}  # type: ignore[assignment]
    agreement.socket.gethostname = lambda: f"n{rank}"  # type: ignore[assignment]
    try:
        agree_on_software(torch.device("cpu"))
    except LaunchError as error:
        return str(error)
    except SystemExit as left:
        return f"left with {left.code}"
    return "agreed"


def test_equal_hosts_agree() -> None:
    assert run_ranks(_agree_over_hosts, 2, ["2.13", "2.13"]) == ["agreed", "agreed"]


def test_unequal_hosts_do_not() -> None:
    first, second, third = run_ranks(_agree_over_hosts, 3, ["2.13", "2.11", "2.13"])
    expected = "the hosts differ: torch: 2.13 on n0, n2; 2.11 on n1; install the same on all, or share one folder"
    assert first == expected
    assert (second, third) == ("left with 2", "left with 2")


def test_ranks_of_one_host_are_not_asked() -> None:
    assert run_ranks(_agree_on_one_host, 2, ["2.13", "2.11"]) == ["agreed", "agreed"]


def _agree_over_hosts(versions: list[str]) -> str:
    return agree(versions, one_host=False)


def _agree_on_one_host(versions: list[str]) -> str:
    return agree(versions, one_host=True)
