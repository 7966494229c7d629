"""Statistics of a table: counts, failures by reason, lengths, frequent captions, lowest scores.

Whole-table figures are DuckDB's aggregates. N-grams are counted in a fixed sample of captions, whose size is stated.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from captioner.caption_columns import CAPTION_COLUMNS, CaptionColumn
from captioner.query.views import Connection
from captioner.repetition import words
from captioner.schema import SCORES
from captioner.terminal import counted, visible

__all__ = ["summarize", "summary_lines"]

_NUM_EXAMPLES = 5
_NUM_BINS = 10
_USUAL_SHARE = 0.995  # of the captions; longer ones share the last bin
_NUM_SAMPLED = 20_000
_GRAM_WORDS = 3
_BAR_WIDTH = 40
_RUN_COLUMNS = "run_id, purpose, model, is_finished, captioned, failed, images_per_s"


def summarize(connection: Connection) -> dict[str, Any]:
    """Return the statistics of a table; those of captions or scores that it does not have are null."""
    captioned, failed = _row(connection, "SELECT (SELECT count(*) FROM captions), (SELECT count(*) FROM failures)")
    return {
        "images": captioned + failed,
        "captioned": captioned,
        "failed": failed,
        "failed_by_reason": dict(
            _rows(connection, "SELECT reason, count(*) AS n FROM failures GROUP BY reason ORDER BY n DESC, reason")
        ),
        **_quality(connection),
        "tokens_histogram": _histogram(connection),
        "frequent_captions": _frequent(connection),
        "frequent_3_grams": _frequent_grams(connection, captioned),
        "lowest": {score: _lowest(connection, score) for score in SCORES},
        "runs": _dicts(connection, f"FROM runs SELECT {_RUN_COLUMNS}"),
    }


def _quality(connection: Connection) -> dict[str, Any]:
    found = _dicts(
        connection,
        """
        SELECT count(DISTINCT model) AS models FROM runs
        """,
    )[0]
    rates = _dicts(
        connection,
        f"""
        SELECT {"".join(_mean(column) for column in CAPTION_COLUMNS if pa.types.is_boolean(column.type))}
            avg((finish_reason = 'length')::INTEGER) AS truncated_share,
            avg((trim(caption) = '')::INTEGER) AS empty_share,
            {"".join(_mean(column) for column in CAPTION_COLUMNS if not pa.types.is_boolean(column.type))}
        FROM captions
        """,
    )[0]
    return found | {name: value if value is None else round(value, 6) for name, value in rates.items()}


def _mean(column: CaptionColumn) -> str:
    """Return the SQL of the column's mean and a comma, empty where no summary has it."""
    if column.mean_name is None:
        return ""
    is_float = pa.types.is_floating(column.type)
    number = f"avg({column.name}) FILTER (isfinite({column.name}))" if is_float else f"avg({column.name}::INTEGER)"
    return f"{number} AS {column.mean_name}, "


def _histogram(connection: Connection) -> list[dict[str, int]]:
    """Return at most ten bins, each with its least and greatest number of tokens.

    They are of equal width up to where few captions are longer; those that are, are the last bin: one caption of 4,096
    tokens would leave all others in the first."""
    sql = "SELECT min(num_tokens), quantile_disc(num_tokens, ?), max(num_tokens) FROM captions"
    least, usual, greatest = connection.execute(sql, [_USUAL_SHARE]).fetchall()[0]
    if least is None:
        return []
    width = (usual - least) // (_NUM_BINS - 1) + 1
    last = min((greatest - least) // width, _NUM_BINS - 1)
    bin_number = f"least((num_tokens - {least}) // {width}, {last})"
    counts = dict(_rows(connection, f"SELECT {bin_number} AS bin, count(*) FROM captions GROUP BY bin"))
    starts = [least + width * number for number in range(last + 1)]
    ends = [*(start - 1 for start in starts[1:]), greatest]
    return [
        {"from": start, "to": end, "captions": counts.get(number, 0)}
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def _frequent(connection: Connection) -> list[dict[str, Any]]:
    return _dicts(
        connection,
        f"""
        SELECT caption, count(*) AS n FROM captions GROUP BY caption HAVING n > 1
        ORDER BY n DESC, caption LIMIT {_NUM_EXAMPLES}
        """,
    )


def _frequent_grams(connection: Connection, num_captions: int) -> dict[str, Any]:
    """Return the most frequent 3-grams of every k-th caption by key, and of how many captions."""
    step = max(1, num_captions // _NUM_SAMPLED)
    captions = [row[0] for row in _rows(connection, f"SELECT caption FROM captions WHERE key % {step} = 0")]
    counts: Counter[str] = Counter()
    for own in map(words, captions):
        grams = zip(*(own[start:] for start in range(_GRAM_WORDS)), strict=False)
        counts.update({" ".join(gram) for gram in grams})
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_NUM_EXAMPLES]
    return {"of_captions": len(captions), "grams": [{"gram": gram, "captions": count} for gram, count in ranked]}


def _lowest(connection: Connection, score: str) -> list[dict[str, Any]]:
    return _dicts(
        connection,
        f"""
        SELECT image_id, caption, {score} FROM captions
        WHERE key IN (SELECT key FROM captions WHERE NOT isnan({score}) ORDER BY {score}, key LIMIT {_NUM_EXAMPLES})
        ORDER BY {score}, key
        """,
    )


def _rows(connection: Connection, sql: str) -> list[tuple[Any, ...]]:
    return connection.execute(sql).fetchall()


def _row(connection: Connection, sql: str) -> tuple[Any, ...]:
    return _rows(connection, sql)[0]


def _dicts(connection: Connection, sql: str) -> list[dict[str, Any]]:
    found = connection.execute(sql)
    names = [column[0] for column in found.description or ()]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


# For people


def summary_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the summary as lines for people."""
    yield from map(visible, _lines(summary))


def _lines(summary: Mapping[str, Any]) -> Iterator[str]:
    yield f"{summary['images']:,} images: {summary['captioned']:,} captioned, {summary['failed']:,} failed"
    yield from (f"  {reason:16} {count:>12,}" for reason, count in summary["failed_by_reason"].items())
    if summary["captioned"]:
        yield from _quality_lines(summary)
        yield from _example_lines(summary)
    yield ""
    yield f"{counted(len(summary['runs']), 'run')} of {counted(summary['models'], 'model')}"
    yield from (f"  {run['run_id']}  {_run(run)}" for run in summary["runs"][-_NUM_EXAMPLES:])


def _run(run: Mapping[str, Any]) -> str:
    """Return what a run was for and what came of it."""
    what = run["model"] or run["purpose"] or "unknown"
    if run["captioned"] is None:
        return f"{what}  {'finished' if run['is_finished'] else 'not finished'}"
    if run["is_finished"] and not run["captioned"] and not run["failed"]:
        return f"{what}  finished, nothing was left to do"
    counts = f"{run['captioned']:,} captioned, {run['failed'] or 0:,} failed"
    interrupted = "" if run["is_finished"] else ", interrupted"
    return f"{what}  {counts}, {run['images_per_s'] or 0:g} images/s{interrupted}"


def _quality_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    for name in ("repetitive_share", "truncated_share", "empty_share"):
        share = summary[name]
        yield f"  {name.removesuffix('_share'):16} {'unknown' if share is None else f'{share:.2%}':>12}"
    yield ""
    yield f"tokens a caption, {summary['mean_tokens']:.1f} on average"
    most = max(bin_["captions"] for bin_ in summary["tokens_histogram"])
    for bin_ in summary["tokens_histogram"]:
        bar = "█" * round(_BAR_WIDTH * bin_["captions"] / most)
        yield f"  {bin_['from']:>5} to {bin_['to']:<5} {bin_['captions']:>12,} {bar}".rstrip()


def _example_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    yield from _counted("most frequent captions", [(row["n"], row["caption"]) for row in summary["frequent_captions"]])
    grams = summary["frequent_3_grams"]
    title = f"most frequent 3-grams, of {grams['of_captions']:,} captions looked at"
    yield from _counted(title, [(row["captions"], row["gram"]) for row in grams["grams"]])
    for score, rows in summary["lowest"].items():
        if rows:
            yield from ["", f"lowest {score}"]
            yield from (
                f"  {row[score]:>12.3f}  {_tail(row['image_id'], 30):30} {_short(row['caption'])}" for row in rows
            )


def _counted(title: str, rows: Sequence[tuple[int, str]]) -> Iterator[str]:
    if rows:
        yield from ["", title]
        yield from (f"  {count:>12,}  {_short(text)}" for count, text in rows)


def _short(text: str, length: int = 80) -> str:
    """Return a text on one line, a long one cut at its end."""
    plain = visible(text)
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def _tail(text: str, length: int) -> str:
    """Return a text on one line, a long one cut at its start: the end tells image ids apart."""
    plain = visible(text)
    return plain if len(plain) <= length else "…" + plain[1 - length :]
