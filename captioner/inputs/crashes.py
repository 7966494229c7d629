"""How often reading a piece of a file has crashed the process: damaged bytes can end the one that reads them.

    with count_crashes(f"{url} row 4096") as num_crashes:    # processes of this machine that died in this block
        ...

A job retries what its processes leave unfinished, and must not do so for ever. A process marks in a local file that it
reads, since it can report nothing once it has died. Keep the block short: a process killed in it for another reason
counts too. Containers that share the folder do not see each other's processes, and ignore each other's marks.
"""

import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from captioner.storage.local_cache import cache_folder
from captioner.storage.processes import machine

__all__ = ["count_crashes"]

_MAX_AGE_S = 3600.0  # an older crash was another job's


@contextmanager
def count_crashes(what: str, machine_id: str | None = None) -> Iterator[int]:
    """Yield how many processes died in a block of this name within the last hour. Leaving the block resets the count.

    machine_id: shared by processes that see each other's ids; by default that of this process.
    """
    folder = _own_folder()
    where = machine() if machine_id is None else machine_id
    name = hashlib.blake2b(f"{where} {what}".encode(), digest_size=12).hexdigest()
    mark = folder / f"{name}.{os.getpid()}"
    with suppress(OSError):  # without room on the disk nothing is counted
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mark.unlink(missing_ok=True)  # of an earlier process of this id
        os.close(os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    dead = [other for other in folder.glob(f"{name}.*") if other != mark and _is_dead(other)]
    try:
        yield len(dead)
    finally:
        for ended in (mark, *dead):
            with suppress(OSError):
                ended.unlink()


def _own_folder() -> Path:
    """Return a folder that is this user's alone: anyone may make one of this name in the temporary folder first."""
    folder = Path(tempfile.gettempdir()) / f"captioner-reading-{os.getuid()}"
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    except OSError:
        is_own = False
    return folder if is_own else cache_folder() / "reading"


def _is_dead(mark: Path) -> bool:
    try:
        age_s = time.time() - mark.stat().st_mtime
        os.kill(int(mark.suffix[1:]), 0)
    except ProcessLookupError:
        return age_s < _MAX_AGE_S
    except (OSError, ValueError):
        pass
    return False
