"""The output folder of a fit: the bundle, and in `_run/` everything to resume from.

    OUTPUT/bundle.json ...     the bundle, once the fit is done
    OUTPUT/llava/              the bundle as transformers' LLaVA, with --save-as llava
    OUTPUT/_run/run.json       the settings that decide on the weights: another fit into the same folder is refused
    OUTPUT/_run/lease/         which fit writes the folder now
    OUTPUT/_run/start/         a bundle with the first, random weights
    OUTPUT/_run/checkpoint.pt  weights, optimizer and position: one object, replaced whole
    OUTPUT/_run/metrics.jsonl  curves.svg  validation.html

Knows names and bytes, on any store; not their contents.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from captioner.errors import OutputError
from captioner.storage import Location, Store, open_store
from captioner.storage.json_text import parse_object
from captioner.storage.temporary_files import is_temporary
from captioner.storage.urls import join, name, parent, redact, scheme
from captioner.tables.identity import flatten, refusal, to_json
from captioner.tables.lease import Lease, take_lease

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
        """Its last component, for people."""
        return name(self.url)

    @property
    def initial_bundle_url(self) -> str:
        """URL of the bundle with the initial weights."""
        return join(self.run_folder, "start")

    @property
    def llava_url(self) -> str:
        """URL of the bundle as transformers' LLaVA."""
        return join(self.url, "llava")

    @property
    def has_llava(self) -> bool:
        """Whether it is there and complete. Raises StoreError."""
        return self._store.info(join(self.llava_url, "config.json")) is not None

    @property
    def has_bundle(self) -> bool:
        """Whether the bundle is complete. Raises StoreError."""
        return self._store.info(join(self.url, "bundle.json")) is not None

    def read(self, name: str) -> bytes | None:
        """Return a file of the run folder, None where there is none. Raises StoreError."""
        return self._store.read_or_none(join(self.run_folder, name))

    def write(self, name: str, data: bytes) -> None:
        """Make a file of the run folder hold exactly this. Raises StoreError."""
        self._store.write_atomic(join(self.run_folder, name), data)

    def identity(self) -> dict[str, Any] | None:
        """Return the identity of an earlier fit, None if there was none. Raises OutputError for a damaged record."""
        data = self.read("run.json")
        try:
            return None if data is None else parse_object(data)
        except ValueError as error:
            raise OutputError(
                f"{redact(self.run_folder)}/run.json is damaged: {error}; restore it, or choose another OUTPUT_BUNDLE"
            ) from error

    def check_owner(self) -> None:
        """Raise OutputError if the folder holds a bundle or model that no fit has written."""
        if self.identity() is not None:
            return
        for file in ("bundle.json", "config.json"):
            if self._store.info(join(self.url, file)) is not None:
                raise OutputError(
                    f"{redact(self.url)} holds {file} but no _run/run.json, so no fit has written it; expected an empty"
                    " folder or an earlier run of this fit. Choose another OUTPUT_BUNDLE"
                )

    def refuse_other_fit(self, identity: Mapping[str, Any]) -> None:
        """Raise OutputError, naming the differences, if another fit has begun here. Writes nothing.

        Labels take long to read: an identity without `labels` is checked by its other fields."""
        found, wanted = self.identity(), flatten(_plain({"format": _FORMAT, **identity}))
        before = {key: value for key, value in flatten(found or {}).items() if key in wanted or key != "labels"}
        if found is not None and before != wanted:
            raise OutputError(refusal(self.url, "another fit", before, wanted, output="OUTPUT_BUNDLE"))

    @contextmanager
    def take_lease(self) -> Iterator[Lease]:
        """Hold the lease of this folder, which keeps every other fit from writing it; see `tables.lease`.

        What a fit that was killed had begun to write on a disk goes."""
        with take_lease(self._store, Location(self.run_folder, self.storage_options), "fit") as lease:
            if scheme(self.url) == "file":
                self._remove_temporaries()
            yield lease

    def _remove_temporaries(self) -> None:
        for page in self._store.pages(self.url + "/"):
            for entry in page:
                if is_temporary(name(entry.url)) and name(parent(entry.url)) != "lease":
                    self._store.remove(entry.url)

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make this the folder of a fit of `identity`. Raises OutputError as `refuse_other_fit` does."""
        self.refuse_other_fit(identity)
        if self.identity() is None:
            self.write("run.json", to_json({"format": _FORMAT, **identity}))


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as its file would have it."""
    return dict(json.loads(to_json(value)))
