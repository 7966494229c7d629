"""Sets of row keys, a byte for each row: which rows a table holds, which are left to do.

Knows the layout of a key (`unit << 32 | position`) and nothing else. A set of ten million rows is ten megabytes. A set
whose keys lie far apart, as hostile parts may have them, takes at most some 300 bytes a key.
"""

from collections.abc import Iterator

import numpy as np

from captioner.schema import MAX_UNIT_ROWS, split_key

__all__ = ["KeySet", "common"]

_SPAN = 1 << 16  # keys of one container: those that agree in their upper 48 bits
_CONTAINERS = MAX_UNIT_ROWS // _SPAN  # of one unit
_SPARSE = 4096  # keys from which a container is a bitmap


class KeySet:
    """A set of row keys.

    Each container holds the keys of one span: few as sorted uint16[n], many as bool[n], grown as needed."""

    def __init__(self) -> None:
        self._containers: dict[int, np.ndarray] = {}
        self._spans_of: dict[int, list[int]] = {}
        """Unit -> the spans of its containers."""

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Add int64[N] keys; return those that were in the set already, or are twice in `keys`."""
        again = []
        for span, indices in _by_span(keys):
            offsets, counts = np.unique(keys[indices] & (_SPAN - 1), return_counts=True)
            is_known = self._are_in(span, offsets)
            again.append(span * _SPAN + offsets[(counts > 1) | is_known])
            if not is_known.all():
                self._insert(span, offsets[~is_known])
        return np.concatenate(again) if again else np.empty(0, np.int64)

    def update(self, other: "KeySet") -> None:
        """Add the keys of another set."""
        for span in other.spans:
            self.add(other.keys_of(span))

    def _are_in(self, span: int, offsets: np.ndarray) -> np.ndarray:
        held = self._containers.get(span)
        if held is None:
            return np.zeros(len(offsets), bool)
        if held.dtype != bool:
            return np.isin(offsets, held)
        found = np.zeros(len(offsets), bool)
        is_here = offsets < len(held)
        found[is_here] = held[offsets[is_here]]
        return found

    def _insert(self, span: int, offsets: np.ndarray) -> None:
        """Add sorted offsets that a container does not have."""
        if span not in self._containers:
            self._spans_of.setdefault(span // _CONTAINERS, []).append(span)
        held = self._containers.get(span, np.empty(0, np.uint16))
        if held.dtype != bool:
            offsets = np.union1d(held, offsets)
            if len(offsets) < _SPARSE:
                self._containers[span] = offsets.astype(np.uint16)
                return
            held = np.empty(0, bool)
        if len(held) <= offsets[-1]:
            grown = np.zeros(min(_SPAN, max(int(offsets[-1]) + 1, 2 * len(held))), bool)
            grown[: len(held)] = held
            held = grown
        held[offsets] = True
        self._containers[span] = held

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Return bool[N], true where a key is in the set."""
        found = np.zeros(len(keys), bool)
        for span, indices in _by_span(keys):
            found[indices] = self._are_in(span, keys[indices] & (_SPAN - 1))
        return found

    def positions(self, unit: int, stop: int, start: int = 0) -> np.ndarray:
        """Return bool[stop - start], true where the unit's row is in the set."""
        found = np.zeros(stop - start, bool)
        for keys in self._of_unit(unit, start, stop):
            found[keys - (unit * MAX_UNIT_ROWS + start)] = True
        return found

    def count(self, unit: int | None = None, start: int = 0, stop: int = MAX_UNIT_ROWS) -> int:
        """Return how many keys are in the set, or in one unit of it at positions from `start` to before `stop`."""
        if unit is None:
            return sum(map(_count, self._containers.values()))
        return sum(map(len, self._of_unit(unit, start, stop)))

    def _of_unit(self, unit: int, start: int, stop: int) -> Iterator[np.ndarray]:
        first, last = unit * MAX_UNIT_ROWS + start, unit * MAX_UNIT_ROWS + stop - 1
        spans = range(first // _SPAN, last // _SPAN + 1)
        for span in sorted(filter(spans.__contains__, self._spans_of.get(unit, ()))):
            keys = self.keys_of(span)
            yield keys[slice(*np.searchsorted(keys, [first, last + 1]))]

    @property
    def spans(self) -> list[int]:
        """Numbers of the spans with keys, in order; the keys of a span come before those of the next."""
        return sorted(self._containers)

    def keys_of(self, span: int) -> np.ndarray:
        """Return int64[n], the sorted keys of one span."""
        held = self._containers.get(span, np.empty(0, np.uint16))
        return span * _SPAN + (np.flatnonzero(held) if held.dtype == bool else held.astype(np.int64))

    def end(self, unit: int) -> int:
        """Return the position after the unit's last row in the set; 0 for none."""
        last = max(self._spans_of.get(unit, ()), default=None)
        return 0 if last is None else split_key(int(self.keys_of(last)[-1]))[1] + 1

    @property
    def units(self) -> set[int]:
        """Ordinals of the units with keys."""
        return set(self._spans_of)


def common(*sets: KeySet) -> KeySet:
    """Return the keys that all of the sets have; of one set itself."""
    found, (first, *others) = KeySet(), sets
    if not others:
        return first
    for span in first.spans:
        keys = first.keys_of(span)
        for other in others:
            keys = keys[other.contains(keys)]
        found.add(keys)
    return found


def _count(held: np.ndarray) -> int:
    return int(held.sum()) if held.dtype == bool else len(held)


def _by_span(keys: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number of a span, int64 indices of its keys) for each span among the keys."""
    order = np.argsort(keys, kind="stable")
    spans, starts = np.unique(keys[order] // _SPAN, return_index=True)
    yield from zip(spans.tolist(), np.split(order, starts[1:]), strict=False)  # without keys there is one empty piece
