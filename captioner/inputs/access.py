"""How what a user named is opened: with its options, and by a session that leads to no host that it may not.

Knows stores and hosts; reads nothing.
"""

from dataclasses import replace
from typing import Any

from captioner.config import InputConfig
from captioner.storage import Location, Store, hosts, open_store, urls
from captioner.storage.http_store import guarded

__all__ = ["host_guard", "open_input", "store_options", "with_home"]


def with_home(access: InputConfig, url: str) -> InputConfig:
    """Return an access that knows the inner addresses of the server of `url`, so that every process agrees on them.

    url: what the user named. A name server may answer the next process with another address."""
    if access.home_addresses is not None:
        return access
    return replace(access, home_addresses=hosts.inner_addresses(url, denies_private=access.deny_private_hosts))


def host_guard(access: InputConfig, home: str) -> hosts.HostGuard:
    """Return what opens the sockets of a session that starts at `home`, the server that the user named."""
    return hosts.HostGuard.at(home, denies_private=access.deny_private_hosts, addresses=access.home_addresses)


def store_options(access: InputConfig, url: str) -> dict[str, Any]:
    """Return the options that open `url`, which is on the server that the user named."""
    if urls.scheme(url) not in ("http", "https"):
        return access.storage_options
    return guarded(url, access.storage_options, url, host_guard(access, url))


def open_input(access: InputConfig, url: str) -> Store:
    """Return the store of `url`, which is on the server that the user named."""
    return open_store(Location(url, store_options(access, url)))
