"""The local cache: files and folders that take long to make, each made once a machine, whole or not at all.

One process makes a thing while the others wait on a lock. Knows nothing of what is made, nor of any store.
"""

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

__all__ = ["MONTH_S", "cache_folder", "make_once"]

MONTH_S = 30 * 86_400.0
_REMOVED = ".removed-"


def cache_folder() -> Path:
    """Return the folder of the cache: `CAPTIONER_CACHE`, or `captioner` in the user's cache folder."""
    configured = os.environ.get("CAPTIONER_CACHE")
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(configured) if configured else Path(user_cache) / "captioner"


def make_once(kind: str, name: str, make: Callable[[Path], None], *, keep_s: float | None = None) -> Path:
    """Return a file or folder of the cache, which `make` has written at the path that it is given.

    `make` is given the same path again after a failure, with what it left there. keep_s: what is like it, files of this
    kind and suffix or folders of this kind, and was not asked for in so many seconds, is removed when another one is
    made; None keeps all.
    """
    target = cache_folder() / kind / name
    while True:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                if not target.exists():
                    _make(target, make, keep_s)
        try:
            os.utime(target)
        except FileNotFoundError:  # removed at this moment, as not asked for in time
            continue
        except OSError:  # a cache that another user filled
            pass
        return target


def _make(target: Path, make: Callable[[Path], None], keep_s: float | None) -> None:
    partial = target.with_name(f"{target.name}.partial")
    make(partial)
    partial.rename(target)
    if keep_s is not None:
        _remove_older(target, time.time() - keep_s)


def _remove_older(target: Path, time_s: float) -> None:
    """Remove what is beside `target` and like it, finished or partial, and was last asked for before a time."""
    for path in target.parent.iterdir():
        is_like = path.is_dir() if target.is_dir() else path.name.removesuffix(".partial").endswith(target.suffix)
        if is_like and path.suffix != ".lock" and path != target:
            with suppress(OSError):  # another process removes it too
                _remove_if_older(path, time_s)


def _remove_if_older(path: Path, time_s: float) -> None:
    """Remove a file or folder; a process that has mapped its files keeps their bytes."""
    if not path.name.startswith(_REMOVED):
        if path.stat().st_mtime >= time_s:
            return
        path = path.rename(path.with_name(f"{_REMOVED}{path.name}"))  # at once: no one finds half a folder
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
