"""`_run/runs/*.json` as a table: one row a run, what it did and with what.

Knows the record that a run writes, and reads it as it is: a field that a later release adds becomes a column.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from captioner.storage.json_text import parse_json
from captioner.tables import CaptionTable

__all__ = ["RUNS", "read_runs"]

_READERS = 16
_COUNT, _RATE = pa.int64(), pa.float64()
_SUMMARY = {
    **dict.fromkeys(("read", "captioned", "failed", "skipped_done"), _COUNT),
    **dict.fromkeys(("seconds", "images_per_s", "tokens_per_s"), _RATE),
}
RUNS = pa.schema(
    [
        ("run_id", pa.string()),
        ("started", pa.timestamp("s")),
        ("is_finished", pa.bool_()),
        ("purpose", pa.string()),
        ("model", pa.string()),
        ("fingerprint", pa.string()),
        *_SUMMARY.items(),
        ("failed_by_reason", pa.string()),
        ("config", pa.string()),
        ("versions", pa.string()),
        ("summary", pa.string()),
    ]
)
"""`failed_by_reason`, `config`, `versions` and `summary` are JSON; DuckDB reads into them: config->>'$.output'."""


def read_runs(table: CaptionTable) -> pa.Table:
    """Return the runs of a table, the first one first. A run that was killed has no summary: its counts are null.

    A record that cannot be read, or is being written, is left with nulls."""
    folder = table.run_folder / "runs"
    names = [name for name in table.store.names(folder) if name.endswith(".json") and not name.startswith(".")]
    with ThreadPoolExecutor(_READERS) as readers:
        texts = list(readers.map(lambda name: table.store.read_bytes(folder / name), names))
    rows = [_row(name.removesuffix(".json"), text) for name, text in zip(names, texts, strict=True)]
    columns = {field.name: [row.get(field.name) for row in rows] for field in RUNS}
    columns["started"] = [_seconds(started) for started in columns["started"]]
    return pa.table({name: pa.array(values, RUNS.field(name).type) for name, values in columns.items()})


def _row(run_id: str, text: bytes) -> dict[str, Any]:
    record = _object(text)
    summary, model = (_mapping(record.get(name)) for name in ("summary", "model"))
    return {
        "run_id": run_id,
        "started": record.get("started"),
        "is_finished": bool(summary) and record.get("interrupted") is not True,
        "purpose": _text(record.get("purpose")) or ("caption" if model else None),
        **{name: _text(model.get(key)) for name, key in (("model", "name"), ("fingerprint", "fingerprint"))},
        **{name: _number(summary.get(name)) for name in _SUMMARY},
        **{name: json.dumps(found) for name, found in _parts(record, summary)},
    }


def _parts(record: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reasons = {"failed_by_reason": summary.get("failed_by_reason")}
    for name, found in (*reasons.items(), *((name, record.get(name)) for name in ("config", "versions", "summary"))):
        if isinstance(found, Mapping):
            yield name, found


def _object(text: bytes) -> Mapping[str, Any]:
    try:
        return _mapping(parse_json(text))
    except ValueError:
        return {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _number(value: object) -> float | int | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _seconds(started: object) -> pa.Scalar | None:
    try:
        return pa.scalar(str(started).removesuffix("Z")).cast(pa.timestamp("s"))
    except pa.ArrowInvalid:
        return None
