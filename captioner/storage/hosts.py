"""Which hosts a URL from a list may lead to: not this machine by any of its addresses, its link-local network or its
cloud's metadata service. Private networks (10/8, 172.16/12, 192.168/16) are allowed unless a user denies them: images
often lie there.

A host name is not enough: `http://127.1/`, a redirect and a name server can all lead inside. The address that a socket
is about to connect to decides, so that nothing changes between check and use. Which addresses the server has that a
user named is decided once, by the driver: its workers are told. Knows addresses; knows no store.
"""

import errno
import functools
import ipaddress
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from captioner.storage import urls

__all__ = ["PRIVATE", "UNSAFE", "HostGuard", "inner_addresses", "is_inner", "is_own", "is_private", "is_same"]

UNSAFE = "address is loopback or link-local"
"""The text in every refusal of an inner address."""

PRIVATE = "address is in a private network"
"""The text in every refusal of a private one."""

# AWS, Alibaba, Azure, Oracle; those of other clouds are link-local
_METADATA = frozenset({"fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"})
_NOT_OURS = "203.0.113.77"  # for documentation (RFC 5737): can be bound only where a host may bind any address
_PRIVATE = tuple(
    map(
        ipaddress.ip_network,
        ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fec0::/10"),
    )
)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_REMEDIES = {UNSAFE: "(--allow-local-uris)", PRIVATE: "(--deny-private-hosts)"}
_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_inner(host: str) -> bool:
    """Return whether a host is this machine, link-local or a cloud's metadata service; the only name is `localhost`."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host)
    if address is None:
        return False
    is_special = address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast
    return is_special or str(address) in _METADATA


def is_private(host: str) -> bool:
    """Return whether a host is an address in a private network: those of RFC 1918, carriers' and their like of IPv6."""
    address = _address(host)
    return address is not None and any(address in network for network in _PRIVATE)


def _address(host: str) -> Address | None:
    try:
        return _embedded(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return None


def _embedded(address: Address) -> Address:
    """Return the IPv4 address that is embedded in an IPv6 address, else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    is_low = int(address) >> 32 == 0 and int(address) > 1  # ::a.b.c.d, not routed today
    if is_low or address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def is_same(url: str, other: str) -> bool:
    """Return whether two http(s) URLs have the same host and port."""
    return _server(url) == _server(other) != ("", None)


def _server(url: str) -> tuple[str, int | None]:
    scheme = urls.scheme(url)
    try:
        return (urls.host(url), urlsplit(url).port or _PORTS.get(scheme)) if scheme in _PORTS else ("", None)
    except ValueError:
        return "", None


@dataclass(frozen=True, kw_only=True)
class HostGuard:
    """A socket factory for aiohttp that refuses inner addresses, except those of one server.

    That server's addresses count as its own only if all of them are inner: whoever owns a public name can point it
    inside. Raises PermissionError with UNSAFE or PRIVATE in its text."""

    host: str
    port: int | None
    denies_private: bool = False
    """Whether private addresses count as inner."""

    addresses: tuple[str, ...] | None = None
    """The server's own inner addresses; by default looked up once in a process, at the first connection."""

    @classmethod
    def at(cls, home: str, *, denies_private: bool = False, addresses: tuple[str, ...] | None = None) -> "HostGuard":
        """Return the guard of what the server of URL `home` leads to."""
        host, port = _server(home)
        return cls(host=host, port=port, denies_private=denies_private, addresses=addresses)

    def __call__(self, found: Any) -> socket.socket:
        """Return a socket for an address as getaddrinfo returns it."""
        family, kind, protocol, _, target = found
        own = self._own()  # looked up at the first connection, whatever that is to
        if (why := self._why_refused(target[0])) and not (target[0] in own and target[1] == self.port):
            raise PermissionError(errno.EACCES, f"{why}: {target[0]} {_REMEDIES[why]}")
        return socket.socket(family=family, type=kind, proto=protocol)

    def _why_refused(self, address: str) -> str:
        if is_inner(address) or is_own(address):
            return UNSAFE
        return PRIVATE if self.denies_private and is_private(address) else ""

    def _own(self) -> Collection[str]:
        if self.addresses is not None or not self.host:
            return self.addresses or ()
        return _inner_home(self.host, self.port, self.denies_private)


def inner_addresses(url: str, *, denies_private: bool = False) -> tuple[str, ...]:
    """Return the addresses of a URL's server, all of which are inner; none of another one, or of no web server."""
    host, port = _server(url)
    return tuple(sorted(_inner_home(host, port, denies_private))) if host else ()


@functools.lru_cache(maxsize=1024)
def _inner_home(host: str, port: int | None, denies_private: bool) -> frozenset[str]:
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port)}
    except OSError:
        return frozenset()
    is_all_inner = all(is_inner(a) or is_own(a) or (denies_private and is_private(a)) for a in found)
    return frozenset(found) if is_all_inner else frozenset()


@functools.lru_cache(maxsize=4096)
def is_own(address: str) -> bool:
    """Return whether an address is one of this machine's own: a socket can be bound to it."""
    return _can_bind(address) and not _can_bind(_NOT_OURS)


def _can_bind(address: str) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
