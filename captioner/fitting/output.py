"""The folder of a fit: the bundle that comes out, and in `_run/` what a fit that was cut goes on from.

    OUTPUT/bundle.json ...     the bundle, once the fit is done
    OUTPUT/_run/run.json       what decides which weights come out: another fit into the same folder is refused
    OUTPUT/_run/start/         a bundle with the first, random weights
    OUTPUT/_run/checkpoint.pt  weights, optimizer and position: one object, replaced whole
    OUTPUT/_run/metrics.jsonl  curves.svg  validation.html

Knows names and bytes, on any store; not what is in them.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from captioner.errors import OutputError
from captioner.sources.store import Store, open_store
from captioner.sources.urls import join, name, redact

__all__ = ["FitOutput"]

_FORMAT = 1


class FitOutput:
    """The output folder of a fit; can be pickled."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        self.storage_options = dict(storage_options or {})
        self.run_folder = join(self.url, "_run")
        self._store: Store = open_store(self.url, self.storage_options)

    @property
    def name(self) -> str:
        """What people call it."""
        return name(self.url)

    @property
    def start_url(self) -> str:
        """Where the bundle with the first weights is."""
        return join(self.run_folder, "start")

    @property
    def has_bundle(self) -> bool:
        """Whether a whole bundle is there. Raises StoreError."""
        return self._store.info(join(self.url, "bundle.json")) is not None

    def read(self, name: str) -> bytes | None:
        """Return a file of the run folder, None where there is none. Raises StoreError."""
        url = join(self.run_folder, name)
        return self._store.read_bytes(url) if self._store.info(url) is not None else None

    def write(self, name: str, data: bytes) -> None:
        """Make a file of the run folder hold exactly this. Raises StoreError."""
        self._store.write_atomic(join(self.run_folder, name), data)

    def identity(self) -> dict[str, Any] | None:
        """Return what an earlier fit was of, None where there was none. Raises OutputError for a damaged record."""
        data = self.read("run.json")
        try:
            return None if data is None else dict(json.loads(data))
        except ValueError as error:
            raise OutputError(
                f"{redact(self.run_folder)}/run.json is damaged: {error}; restore it, or choose another OUTPUT_BUNDLE"
            ) from error

    def check_owner(self) -> None:
        """Raise OutputError where a bundle or model is that no fit has written here."""
        if self.identity() is not None:
            return
        for file in ("bundle.json", "config.json"):
            if self._store.info(join(self.url, file)) is not None:
                raise OutputError(
                    f"{redact(self.url)} holds {file} but no _run/run.json, so it is somebody else's; expected an empty"
                    " folder or an earlier run of this fit. Choose another OUTPUT_BUNDLE"
                )

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise OutputError, naming what differs, where another fit has begun here. Writes nothing.

        An identity without `labels` is checked as far as it goes: they take long to read."""
        found, wanted = self.identity(), _flat(_plain({"format": _FORMAT, **identity}))
        before = {key: value for key, value in _flat(found or {}).items() if key in wanted or key != "labels"}
        if found is not None and before != wanted:
            raise OutputError(_difference(self.url, before, wanted))

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make this the folder of a fit of `identity`. Raises OutputError as `check` does."""
        self.check(identity)
        if self.identity() is None:
            self.write("run.json", _json({"format": _FORMAT, **identity}))


def _difference(url: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    keys = sorted(key for key in before | now if before.get(key) != now.get(key))
    lines = [f"  {key}: {before.get(key)} there, {now.get(key)} now" for key in keys]
    return "\n".join(
        [
            f"{redact(url)} holds another fit; expected the same settings as before. These differ:",
            *lines,
            "Choose another OUTPUT_BUNDLE, or repeat the earlier settings to continue it.",
        ]
    )


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as it comes back from its file."""
    return dict(json.loads(_json(value)))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    def pairs(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from pairs(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(pairs(values, ""))
