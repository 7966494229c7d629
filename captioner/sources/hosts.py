"""Which hosts a name from outside may lead to: not this machine, not its link, not its cloud's metadata service.

A name alone says little: `http://127.1/`, a redirect and a name server can all lead inside. So what decides is the
address that a socket is about to be opened to. Knows addresses; knows no store.
"""

import errno
import ipaddress
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from captioner.sources import urls

__all__ = ["UNSAFE", "is_inner", "is_same", "socket_guard"]

UNSAFE = "address is loopback or link-local"
"""What stands in every refusal."""

# AWS, Alibaba, Azure, Oracle; the others' are link-local
_METADATA = frozenset({"fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"})
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_inner(host: str) -> bool:
    """Say whether a host is this machine, on its link, or a cloud's metadata service; by name only for `localhost`."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = _embedded(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return False
    is_special = address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast
    return is_special or str(address) in _METADATA


def _embedded(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 one stands for, in whatever way, else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    is_low = int(address) >> 32 == 0 and int(address) > 1  # ::a.b.c.d, which routes to nothing today
    if is_low or address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def is_same(url: str, other: str) -> bool:
    """Say whether two http(s) URLs lead to one server: the same host and port."""
    return _server(url) == _server(other) != ("", None)


def _server(url: str) -> tuple[str, int | None]:
    scheme = urls.scheme(url)
    try:
        return (urls.host(url), urlsplit(url).port or _PORTS.get(scheme)) if scheme in _PORTS else ("", None)
    except ValueError:
        return "", None


def socket_guard(home: str) -> Callable[[Any], socket.socket]:
    """Return a socket factory, for aiohttp, that refuses inner addresses, but not those of the server of URL `home`.

    What it makes raises PermissionError with UNSAFE in its text.
    """
    host, port = _server(home)
    allowed: set[tuple[str, int]] = set()

    def open_socket(found: Any) -> socket.socket:
        family, kind, protocol, _, target = found
        if is_inner(target[0]) and not _is_home(target):
            raise PermissionError(errno.EACCES, f"{UNSAFE}: {target[0]} (--allow-local-uris)")
        return socket.socket(family=family, type=kind, proto=protocol)

    def _is_home(target: Any) -> bool:
        if host and not allowed:
            allowed.update((str(info[4][0]), int(info[4][1])) for info in socket.getaddrinfo(host, port))
        return target[:2] in allowed

    return open_socket
