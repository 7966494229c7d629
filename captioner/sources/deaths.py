"""What reading a piece of a file did to processes before: damaged bytes may end the one that reads them.

    with begun(f"{url} row 4096") as num_deaths:    # of processes of this machine that died in this block
        ...

A job tries again what its processes leave unfinished, and must not do so for ever. Kept in files of the machine, since
who died can say nothing. The block is to be short: whoever is killed in it for another reason counts too. Containers
that share the folder do not see each other's processes, and leave each other's marks alone.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from captioner.sources.processes import machine

__all__ = ["begun"]

_FORGOTTEN_S = 3600.0  # a death of long ago was another job's


@contextmanager
def begun(what: str) -> Iterator[int]:
    """Yield how many processes died in the middle of this within the last hour; forgets them once one does not."""
    folder = Path(tempfile.gettempdir()) / f"captioner-reading-{os.getuid()}"
    name = hashlib.blake2b(f"{machine()} {what}".encode(), digest_size=12).hexdigest()
    mark = folder / f"{name}.{os.getpid()}"
    with suppress(OSError):  # a machine without room for this goes on without
        folder.mkdir(mode=0o700, exist_ok=True)
        mark.touch()
    dead = [other for other in folder.glob(f"{name}.*") if other != mark and _is_dead(other)]
    try:
        yield len(dead)
    finally:
        for ended in (mark, *dead):
            with suppress(OSError):
                ended.unlink()


def _is_dead(mark: Path) -> bool:
    try:
        age_s = time.time() - mark.stat().st_mtime
        os.kill(int(mark.suffix[1:]), 0)
    except ProcessLookupError:
        return age_s < _FORGOTTEN_S
    except (OSError, ValueError):
        pass
    return False
