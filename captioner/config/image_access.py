"""Flags for reading the images of a caption table again."""

from dataclasses import dataclass

from captioner.config.checks import check_hosts

__all__ = ["ImageAccessConfig"]


@dataclass(frozen=True, kw_only=True)
class ImageAccessConfig:
    """How the images behind a caption table are reached, where they are read again."""

    image_storage_options: dict[str, object] | None = None
    """fsspec options of the images' store, as JSON.
    By default those of the table, when both are on the same kind of store or the table is local."""

    image_root: str = ""
    """Folder that the images lie in now, on any fsspec store, where they were moved or copied since the job read them
    from its INPUT, or from the folder of a list."""

    allow_local_uris: bool = False
    """Follow local paths, and loopback or link-local hosts, that a remote list of images points to."""

    deny_private_hosts: bool = False
    """Follow no URL to a web server in a private network (10/8, 172.16/12, 192.168/16) or to an inner host, except to
    the table's own server."""

    def __post_init__(self) -> None:
        check_hosts(self.allow_local_uris, self.deny_private_hosts)
