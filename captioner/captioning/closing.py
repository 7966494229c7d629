"""What a caption job says to people at its end: what became of the images, how to see failures, what to type next.

Knows the plan and the summary; no Ray.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from captioner.captioning.job import DEMO_MODEL
from captioner.inputs import num_further_images
from captioner.terminal import command, counted, visible

if TYPE_CHECKING:
    from captioner.captioning.plan import Plan  # not at run time: it brings the model room, and tasks import this

__all__ = ["closing_lines", "duration", "interrupted_text", "outcome"]

_FAILURES_SQL = "SELECT reason, image_id, detail FROM failures ORDER BY reason"
_NUM_EXAMPLES = 5
_LABEL = 10  # width of the words that lines begin with


def closing_lines(plan: "Plan", summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the last lines for a person: the outcome first, then a few captions, then commands to copy."""
    output = str(plan.table.location)
    yield outcome(plan, summary)
    if summary["read"]:
        yield _line("took", _times(summary))
    if summary.get("predicted"):
        yield _line("planned", f"{duration(summary['predicted']['seconds'])}, by jobs/plan.py")
    if num_further := num_further_images(plan.table.run_folder):
        further = f"{num_further:,} images of tars beside the first of their sample: --tar-images all takes them"
        yield _line("left out", further)
    if num_further := plan.frozen.num_further:
        further = f"{num_further:,} images beside the first in the list of their row: --explode-images takes them"
        yield _line("left out", further)
    if told := _answers(summary.get("prompts", {})):
        yield _line("prompts", told)
    if plan.job.is_demo_model_elsewhere and _num_captioned(plan, summary):
        yield _line("beware", f"{DEMO_MODEL}. Give --model")
    for row in plan.table.sample(_NUM_EXAMPLES):
        yield visible(f"  {row['image_id'].rpartition('/')[2]:24} {row['caption']}")
    if _num_captioned(plan, summary):
        yield _line("table", f"{output}/captions (read it with pandas.read_parquet), failures beside it")
    for family in plan.families[1:]:
        yield _line("column", f"{output}/{family.rows}: {family.prompt} by key, joined by query, gallery and export")
    yield from _next(plan, summary)


def _next(plan: "Plan", summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the commands for what may come next, each whole and quoted."""
    output = str(plan.table.location)
    if _num_failed(plan, summary):
        yield _line("failures", command("query", output, _FAILURES_SQL))
    following = [command("gallery", output), command("query", output)] if _num_captioned(plan, summary) else []
    following.append(command("verify", output))
    if plan.job.reads_demo_images:
        following.append(f"{command('caption')} IMAGES OUTPUT --model BUNDLE")
    for place, text in enumerate(following):
        yield _line("" if place else "next", text)
    if plan.table.location.storage_options:
        yield _line("", "each with the same --storage-options, which are not shown here")


def outcome(plan: "Plan", summary: Mapping[str, Any]) -> str:
    """Return what became of the images, on one line: `4,998 captioned, 2 failed (1 empty, 1 corrupt), 213 images/s`.

    One that says so in capitals where the table has no caption at all."""
    if not summary["read"]:
        before = counted(plan.num_skipped, "image")
        were = "was" if plan.num_skipped == 1 else "were"
        text = f"nothing was left to do: {before} {were} done already, and no part was changed"
        if plan.done.num_failed and not plan.done.num_captioned:
            return f"NO IMAGE WAS CAPTIONED: {text}; all of them failed"
        return text + (f"; {plan.done.num_failed:,} of them failed" if plan.done.num_failed else "")
    failed = _failed(summary)
    if not _num_captioned(plan, summary):
        return f"NO IMAGE WAS CAPTIONED: {failed}"
    before = f" ({plan.num_skipped:,} more were done before)" if plan.num_skipped else ""
    asked = f" by {', '.join(plan.added_alone)} alone" if plan.added_alone else ""
    return f"{summary['captioned']:,} captioned{asked}{before}, {failed}, {_rate(summary['images_per_s'])} images/s"


def interrupted_text(plan: "Plan", summary: Mapping[str, Any]) -> str:
    """Return what a run that was ended early has saved, and what is left."""
    left = "" if plan.num_left is None else f", {plan.num_left - summary['read']:,} are left"
    return f"{summary['captioned']:,} captioned, {_failed(summary)}, all of them saved{left}"


def _failed(summary: Mapping[str, Any]) -> str:
    reasons = sorted(summary["failed_by_reason"].items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
    return f"{summary['failed']:,} failed ({named})" if reasons else "none failed"


def _answers(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return what is counted of the answers to each prompt: `tags 3 cut, 1 redrawn; is_photo 2 cut, 2 null`."""
    told = {name: ", ".join(f"{num:,} {what}" for what, num in found.items() if num) for name, found in counts.items()}
    return "; ".join(f"{name} {text}" for name, text in told.items() if text)


def _num_captioned(plan: "Plan", summary: Mapping[str, Any]) -> int:
    return int(summary["captioned"]) + plan.done.num_captioned


def _num_failed(plan: "Plan", summary: Mapping[str, Any]) -> int:
    return int(summary["failed"]) + plan.done.num_failed


def _times(summary: Mapping[str, Any]) -> str:
    first = summary.get("first_caption_s")
    after = "" if first is None else f", the first captions after {duration(first)}"
    return duration(summary["seconds"]) + after


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def duration(seconds: float) -> str:
    """Return `8.2 s`, `3 min 5 s` or `2 h 14 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _line(word: str, text: str) -> str:
    return f"{word:{_LABEL}}{text}"
