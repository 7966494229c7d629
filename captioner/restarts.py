"""Whether a worker that was ended may start once more: a lost node is nothing, a process that dies each time is.

Ray restarts a worker without end. Arithmetic only; knows no Ray, and what is kept of a start in between.
"""

import json
from collections.abc import Container
from dataclasses import asdict, dataclass

from captioner.errors import JobError

__all__ = ["Start", "next_start"]

_MOST_LOADING = 3  # in a row, of processes that were killed while they loaded: each may take minutes
_MOST_RUNNING = 10  # of those that died soon after: an image that no process survives ends each that takes it
_LONG_S = 600.0  # who has run so long did not die of what ended the one before


@dataclass(frozen=True, kw_only=True)
class Start:
    """The last start of one worker."""

    process: str
    node: str
    num_ended: int = 0
    """Processes before it that died one after another, their nodes still there."""

    loaded_at: float | None = None
    """Unix time at which it had loaded; None until then."""

    def dump(self) -> bytes:
        """Return it as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, data: bytes | None) -> "Start | None":
        """Return what `dump` made, None of nothing."""
        return None if data is None else cls(**json.loads(data))


def next_start(last: Start | None, process: str, node: str, *, alive: Container[str], now: float) -> Start:
    """Return the start that a process makes of a worker whose last one was another's, or its own try before.

    alive: the nodes that live. Raises JobError when the processes before it have died too often.
    """
    if last is None or last.process == process:
        return last or Start(process=process, node=node)
    num_ended = last.num_ended + (last.node in alive)
    if last.loaded_at is not None and now - last.loaded_at > _LONG_S:
        num_ended = 0
    _check(num_ended, is_loading=last.loaded_at is None)
    return Start(process=process, node=node, num_ended=num_ended)


def _check(num_ended: int, *, is_loading: bool) -> None:
    if num_ended >= (_MOST_LOADING if is_loading else _MOST_RUNNING):
        when = "while it loaded" if is_loading else f"within {_LONG_S / 60:g} minutes of loading"
        raise JobError(
            f"a worker was killed {num_ended} times in a row {when}, and not by the loss of its node; its machine may"
            " have too little memory for the model. Expected one that holds it: larger machines, fewer workers on"
            " each, or fewer --slots"
        )
