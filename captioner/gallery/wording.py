"""What a page calls the values of a table: in words for people who look at images, not in names of columns.

Knows the columns' values; no table and no page.
"""

import re

from captioner.schema import FinishReason
from captioner.storage.urls import name

__all__ = ["COMPLETE", "FAILED", "NO_ANSWER", "doubt_words", "finish_word", "model_name"]

FAILED, COMPLETE = "failed", "complete"
NO_ANSWER = "no answer"

_FINISH = {str(FinishReason.STOP): COMPLETE, str(FinishReason.LENGTH): "cut off"}
_DOUBTS = {  # as `captioner.query.review` names them in its column `why`
    "low clip_score": "poor match",
    "low mean_logprob": "unsure",
    "low min_logprob": "one unsure word",
    "repetitive": "repetitive",
    "truncated": _FINISH[str(FinishReason.LENGTH)],
}
_SAYS_NOTHING = re.compile(r"(bundle|model|checkpoint|best|last|final|latest|output)s?[-_.]?\d*", re.IGNORECASE)
_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]+$")


def finish_word(reason: str) -> str:
    """Return `cut off` or `complete` for a finish_reason, and any other text as it is."""
    return _FINISH.get(reason, reason)


def doubt_words(why: object) -> list[str]:
    """Return the words for what makes a caption doubtful; none for a text that is not the review's."""
    parts = why.split(", ") if isinstance(why, str) else []
    return [_DOUBTS[part] for part in parts] if set(parts) <= set(_DOUBTS) else []


def model_name(recorded: str) -> str:
    """Return what people call a model that a table names by hub id, URL or folder."""
    path = recorded.rstrip("/")
    if path.endswith("/captioner/demo/bundle"):
        return "the demo model"
    if cached := _HUB_CACHE.search(path):
        return f"{cached[1]}/{cached[2]}"
    if not path.startswith("/"):
        return path
    last = name(path)
    above = name(path.removesuffix(last))
    return f"{above}/{last}" if above and _SAYS_NOTHING.fullmatch(last) else last
