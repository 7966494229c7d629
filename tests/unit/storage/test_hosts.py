"""Which addresses a connection may be opened to."""

import socket
from collections.abc import Iterator

import pytest

from captioner.storage import hosts


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str]]]:
    """Host names and their addresses, which a test may change."""
    found: dict[str, list[str]] = {}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [target(name, port) for name in found[host]])
    hosts._inner_home.cache_clear()
    yield found
    hosts._inner_home.cache_clear()


def target(address: str, port: int = 80) -> tuple[object, ...]:
    return socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)


def test_a_server_that_the_user_named_may_be_inside(names: dict[str, list[str]]) -> None:
    names["home.example"] = ["127.0.0.1"]
    hosts.HostGuard.at("http://home.example/list.txt")(target("127.0.0.1")).close()
    with pytest.raises(PermissionError, match=hosts.UNSAFE):
        hosts.HostGuard.at("http://home.example/list.txt")(target("127.0.0.1", 8080))


def test_a_name_with_a_public_and_an_inner_address_does_not_lead_inside(names: dict[str, list[str]]) -> None:
    names["both.example"] = ["203.0.113.1", "127.0.0.1"]
    open_socket = hosts.HostGuard.at("http://both.example/list.txt")
    open_socket(target("203.0.113.1")).close()
    with pytest.raises(PermissionError, match=hosts.UNSAFE):
        open_socket(target("127.0.0.1"))


def test_a_public_name_that_is_pointed_inside_later_does_not_lead_there(names: dict[str, list[str]]) -> None:
    names["turns.example"] = ["203.0.113.1"]
    open_socket = hosts.HostGuard.at("http://turns.example/list.txt")
    open_socket(target("203.0.113.1")).close()
    names["turns.example"] = ["127.0.0.1"]
    for guard in (open_socket, hosts.HostGuard.at("http://turns.example/2.jpg")):
        with pytest.raises(PermissionError, match=hosts.UNSAFE):
            guard(target("127.0.0.1"))


def test_each_address_of_this_machine_is_inner() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))  # sends nothing; asks which address of ours leads there
        except OSError:
            pytest.skip("this machine has no address but loopback")
        own = probe.getsockname()[0]
    assert hosts.is_own(own)
    assert not hosts.is_own("203.0.113.1")
    with pytest.raises(PermissionError, match=hosts.UNSAFE):
        hosts.HostGuard.at("s3://bucket/list.txt")(target(own))


@pytest.mark.parametrize("address", ["10.0.0.1", "172.31.0.9", "192.168.1.1", "100.64.0.1", "::ffff:10.0.0.1"])
def test_private_networks_are_open_unless_they_are_denied(names: dict[str, list[str]], address: str) -> None:
    names["lists.example"] = ["203.0.113.1"]
    hosts.HostGuard.at("http://lists.example/list.txt")(target(address)).close()
    with pytest.raises(PermissionError, match=rf"{hosts.PRIVATE}: .*\(--deny-private-hosts\)"):
        hosts.HostGuard.at("http://lists.example/list.txt", denies_private=True)(target(address))


def test_a_private_server_that_the_user_named_is_home_where_private_hosts_are_denied(
    names: dict[str, list[str]],
) -> None:
    names["intranet.example"] = ["10.0.0.1"]
    open_socket = hosts.HostGuard.at("http://intranet.example/list.txt", denies_private=True)
    open_socket(target("10.0.0.1")).close()
    for other in (target("10.0.0.2"), target("10.0.0.1", 8080)):
        with pytest.raises(PermissionError, match=hosts.PRIVATE):
            open_socket(other)


def test_workers_follow_what_the_driver_found_of_a_server_and_no_later_answer(names: dict[str, list[str]]) -> None:
    names["turns.example"] = ["203.0.113.1"]
    found = hosts.inner_addresses("http://turns.example/list.txt")
    names["turns.example"] = ["127.0.0.1"]
    hosts._inner_home.cache_clear()  # as in the process of a worker
    with pytest.raises(PermissionError, match=hosts.UNSAFE):
        hosts.HostGuard.at("http://turns.example/2.jpg", addresses=found)(target("127.0.0.1"))
    hosts.HostGuard.at("http://turns.example/2.jpg")(target("127.0.0.1")).close()  # which alone would let it in
