"""One row of metrics.jsonl: the name of a figure -> its value."""

__all__ = ["Row"]

Row = dict[str, float]
