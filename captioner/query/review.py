"""The most doubtful captions of a table, which a person should look at first.

The doubt of a caption is the sum of

    low mean_logprob, low min_logprob, low clip_score   how far it lies below the table's median, in units of the
                                                        distance from the median to the lowest 5 %; 0 if not below
    repetitive, truncated                               2 each: is_repetitive; finish_reason is length

so that a flag weighs as much as a score twice as low as that of the lowest twentieth. A score that the table does not
have counts 0. Equal doubts go by key: the same table gives the same rows. Knows SQL, and nothing of pages.
"""

from captioner.errors import ConfigError
from captioner.query.views import Connection
from captioner.schema import SCORES

__all__ = ["doubtful_sql"]

_FLAG_WEIGHT = 2.0
_TOO_LOW = 1.0  # from here on `why` names a score: it is among the lowest twentieth
_PLACES = 3


def doubtful_sql(connection: Connection, num_rows: int) -> str:
    """Return the SELECT of the most doubtful captions, the worst first: doubt, why, and all columns of `captions`.

    Reads the scores of the whole table. Raises ConfigError where there is no caption."""
    doubts = {f"low {score}": term for score in SCORES if (term := _doubt_of(connection, score))}
    doubts |= {
        "repetitive": f"{_FLAG_WEIGHT} * coalesce(is_repetitive, false)::INTEGER",
        "truncated": f"{_FLAG_WEIGHT} * (finish_reason = 'length')::INTEGER",
    }
    if not connection.execute("SELECT count(*) FROM captions").fetchall()[0][0]:
        raise ConfigError("--review looks for doubtful captions, and the table has no caption yet")
    why = ", ".join(f"CASE WHEN {term} >= {_TOO_LOW} THEN '{name}' END" for name, term in doubts.items())
    doubt = " + ".join(doubts.values())
    # The worst are found by key, doubt and nothing else: captions are read of those alone.
    return f"""
        WITH doubted AS (
            SELECT key, round(({doubt})::DOUBLE, {_PLACES}) AS doubt, concat_ws(', ', {why}) AS why
            FROM captions ORDER BY doubt DESC, key LIMIT {num_rows}
        )
        SELECT doubt, why, captions.* FROM captions JOIN doubted USING (key) ORDER BY doubt DESC, key
    """


def _doubt_of(connection: Connection, score: str) -> str:
    """Return SQL for how doubtful a score makes its caption, empty where the table has no such scores that differ."""
    quantiles = f"quantile_disc({score}, [0.5, 0.05])"  # of the values that are there: the same on any number of cores
    [[found]] = connection.execute(f"SELECT {quantiles} FROM captions WHERE isfinite({score})").fetchall()
    if found is None or found[0] <= found[1]:
        return ""
    median, low = found
    return f"coalesce(greatest(0, ({median!r} - {score}) / {median - low!r}), 0)"
