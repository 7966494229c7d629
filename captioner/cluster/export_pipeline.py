"""The export job: on Ray where images are read again, without it where not.

Imports Ray once there are images to read. What a task does is in `export`; the tasks are in `export_stream`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from captioner.config import ExportConfig
from captioner.export import Pending, export_table, write_shards
from captioner.export.request import Outcome

__all__ = ["export_captions"]


def export_captions(config: ExportConfig) -> Mapping[str, Any]:
    """Export what is new and return the summary. Raises as `export.export_table`."""
    return export_table(config, _run)


def _run(pending: Pending) -> Iterator[Outcome]:
    if not pending.reads_images:
        return write_shards(pending)
    from captioner.cluster.export_stream import run  # here, not above: it brings Ray

    return run(pending)
