"""Decode children that outlive their decoder: the next one of the same settings takes its child over.

To start one takes 0.2 s of a core, and most tests start one for a few images. What a child does is the same; a test of
its start, its end or its death does without this.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest

from captioner.images import decoder
from captioner.images.child import Child, _Running


class KeptChild(Child):
    """A child whose process is taken over by the next one with the same task."""

    idle: ClassVar[defaultdict[Any, list[_Running]]] = defaultdict(list)
    _is_asked = False

    def _start(self) -> _Running:
        if self.idle[self._task]:
            self._running = self.idle[self._task].pop()
            return self._running
        return super()._start()

    def _ask(self, images: Sequence[Any], places: Any) -> Any:
        self._is_asked = True  # whoever ends it now leaves answers behind that no other may get
        found = super()._ask(images, places)
        self._is_asked = False
        return found

    def end(self) -> None:
        running = self._running
        if running is None or self._is_asked or running.process.poll() is not None:
            super().end()
            return
        self._running = None
        self.idle[self._task].append(running)


@contextmanager
def kept_decode_children() -> Iterator[None]:
    """Decoders that are made meanwhile share children, which end with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "Child", KeptChild)
        yield
    while KeptChild.idle:
        task, running = KeptChild.idle.popitem()
        for one in running:
            child = Child(*task)
            child._running = one
            child.end()
