"""The meeting place is looked at before anybody waits for it."""

import socket

import pytest
from ranks import free_port

from neox.errors import LaunchError
from neox.launch import meeting
from neox.launch.environment import Placement
from neox.launch.meeting import check_address, check_port, enter


def place(rank: int = 0, *, world: int = 2, addr: str = "127.0.0.1", port: int = 29500) -> Placement:
    return Placement(rank, 0, world, 1, addr, port, "environment")


def test_a_free_port_and_a_known_name() -> None:
    environ: dict[str, str] = {}
    enter(place(port=free_port()), environ)
    assert environ["RANK"] == "0"
    assert environ["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_port_in_use(family: socket.AddressFamily) -> None:
    try:
        other = socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError:
        other = socket.create_server(("", 0))  # a machine without IPv6
    with other:
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"master_port: {port} is in use on .*; set another"):
            enter(place(port=port), {})
        # The others come to rank 0's host, and torchrun has the port itself.
        enter(place(1, port=port), {})
        enter(place(port=port), {"TORCHELASTIC_USE_AGENT_STORE": "True"})
        enter(place(world=1, port=port), {})


def test_port_that_others_left_a_moment_ago() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first keeps the port in TIME_WAIT
        client.close()
    check_port(port)


def test_unknown_name() -> None:
    with pytest.raises(LaunchError, match=r"master_addr: 'no\.such\.host\.invalid' is unknown on") as error:
        enter(place(1, addr="no.such.host.invalid"), {})
    assert "\n" not in str(error.value)


def test_a_pods_name_may_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def lookup(host: str, port: None) -> list[str]:
        calls.append(host)
        if len(calls) < 3:
            raise socket.gaierror("not yet")
        return []

    monkeypatch.setattr(meeting.socket, "getaddrinfo", lookup)
    monkeypatch.setattr(meeting, "_POLL_SECONDS", 0.01)
    enter(place(1, addr="job-0"), {"KUBERNETES_SERVICE_HOST": "10.96.0.1"})
    assert calls == ["job-0"] * 3
    calls.clear()
    with pytest.raises(LaunchError):
        check_address("job-0")
