"""Whether a worker may start once more: losses of its node do not count, processes that die one after another do.

Ray restarts a worker without end. Arithmetic only; knows neither Ray nor where starts are kept.
"""

from collections.abc import Container
from dataclasses import dataclass

from captioner.errors import JobError

__all__ = ["Start", "next_start"]

_MAX_LOADING = 3  # deaths in a row while loading: each load may take minutes
_MAX_RUNNING = 10  # deaths in a row soon after: an image that no process survives ends each one that takes it
_LONG_S = 600.0  # a process that ran so long did not die of what killed the one before


@dataclass(frozen=True, kw_only=True)
class Start:
    """The last start of one worker."""

    process: str
    node: str
    num_ended: int = 0
    """Processes before it that died one after another while their nodes lived."""

    loaded_at: float | None = None
    """Unix time at which it had loaded, None until then."""


def next_start(last: Start | None, process: str, node: str, *, alive: Container[str], now: float) -> Start:
    """Return the start of a worker in a process. last: its start before, in another process or in this one.

    alive: nodes that are alive. Raises JobError when too many processes in a row have died.
    """
    if last is None or last.process == process:
        return last or Start(process=process, node=node)
    num_ended = last.num_ended + (last.node in alive)
    if last.loaded_at is not None and now - last.loaded_at > _LONG_S:
        num_ended = 0
    _check(num_ended, is_loading=last.loaded_at is None)
    return Start(process=process, node=node, num_ended=num_ended)


def _check(num_ended: int, *, is_loading: bool) -> None:
    if num_ended >= (_MAX_LOADING if is_loading else _MAX_RUNNING):
        when = "while it loaded" if is_loading else f"within {_LONG_S / 60:g} minutes of loading"
        raise JobError(
            f"a worker was killed {num_ended} times in a row {when}, and not by the loss of its node; its machine may"
            " have too little memory for the model. Expected one that holds it: larger machines, fewer workers on"
            " each, or fewer --slots"
        )
