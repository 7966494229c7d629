"""The number format in which a run computes, and those of the captions that a table holds already.

`--dtype auto` is another format with a GPU than without one, which is known once the cluster is. Knows records of runs
and no model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from captioner.config import ModelConfig
from captioner.errors import OutputError
from captioner.tables import CaptionTable

__all__ = ["check_dtype", "resolved_dtype"]


def resolved_dtype(config: ModelConfig, worker_gpus: float) -> str:
    """Return the format in which workers with so many GPUs compute; a GPU without bfloat16 has float16 in its place."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if worker_gpus and config.device != "cpu" else "float32"


def check_dtype(table: CaptionTable, dtype: str) -> None:
    """Raise OutputError where a table has captions, none of which was computed in this format, as far as is known."""
    earlier = set(_dtypes(table)) if table.parts("captions") else set()
    if earlier and dtype not in earlier:
        known = " and ".join(sorted(earlier))
        raise OutputError(
            f"{table.location} holds captions computed in {known}, and this run would compute in {dtype}, by --dtype"
            f" and the workers' GPUs; expected the format of before. Pass --dtype {min(earlier)}, or choose another"
            " OUTPUT"
        )


def _dtypes(table: CaptionTable) -> Iterator[str]:
    named = _mapping((table.identity() or {}).get("model")).get("dtype", "auto")
    if named != "auto":
        yield str(named)
        return
    for run_id in sorted(table.run_ids()):
        record = table.recorded(run_id)
        if dtype := _mapping(record.get("model")).get("dtype") or _dtype_of_older(record):
            yield str(dtype)


def _dtype_of_older(record: Mapping[str, Any]) -> str:
    """Return the format of a run whose record does not name it; empty where nothing tells."""
    config = _mapping(_mapping(record.get("config")).get("model"))
    worker_gpus = _mapping(record.get("allocation")).get("worker_gpus")
    if config.get("dtype") not in (None, "auto"):
        return str(config["dtype"])
    if not isinstance(worker_gpus, int | float):
        return ""
    is_cpu = config.get("device") == "cpu"
    return resolved_dtype(ModelConfig(), 0.0 if is_cpu else worker_gpus)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
