"""What a caption table, a fit or a cache of features was made with: JSON on disk, compared setting by setting.

A setting of the decoding that a record lacks counts as its default: the release that wrote it had no such setting.
Knows plain values in nested mappings, and not where they are kept.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from captioner.config import DecodingConfig
from captioner.storage import Place, as_location

__all__ = ["flatten", "refusal", "settings_that_differ", "to_json"]


def to_json(value: Mapping[str, Any]) -> bytes:
    """Return the bytes of a JSON file; equal values have equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def flatten(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return each setting under its dotted name: {"model": {"name": "demo"}} is {"model.name": "demo"}."""
    settings = dict(_settings(identity, ""))
    return {**(_decoding_defaults() if "decoding" in identity else {}), **settings}


@cache
def _decoding_defaults() -> dict[str, Any]:
    return dict(_settings(json.loads(to_json(asdict(DecodingConfig()))), "decoding."))


def _settings(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def settings_that_differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return name and both values of each setting that differs between two identities; None where one lacks it."""
    first, second = flatten(before), flatten(now)
    recorded = dict(_settings(before, "")) | dict(_settings(now, ""))  # a default that neither records says nothing
    return [(name, first.get(name), second.get(name)) for name in recorded if first.get(name) != second.get(name)]


def refusal(output_folder: Place, holds: str, before: Mapping[str, Any], now: Mapping[str, Any], *, output: str) -> str:
    """Return the message for a job whose output folder holds another job's work.

    holds: what is there, as in "captions of another job"; output: what the command line calls the folder."""
    differing = sorted(settings_that_differ(before, now), key=lambda setting: setting[0])
    lines = [f"  {name}: {there} there, {wanted} now" for name, there, wanted in differing]
    return "\n".join(
        [
            f"{as_location(output_folder)} holds {holds}; expected the same settings as before. These differ:",
            *lines,
            f"Choose another {output}, or repeat the earlier settings to continue it.",
        ]
    )
