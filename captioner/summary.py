"""What a caption job says of itself: the record in `_run/runs/`, the summary, the last words to a person.

Knows the plan and what was written; no Ray.
"""

import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from captioner import __version__
from captioner.prediction import Costs, kept, predict, settings_digest
from captioner.resources import Allocation, Cluster
from captioner.sources.urls import redact
from captioner.tables import PartSummary
from captioner.waiting import first_caption_at, waited_share

if TYPE_CHECKING:
    from captioner.plan import Plan  # not at run time: it brings the model room, and tasks import this

__all__ = ["facts", "farewell", "planned", "predicted", "summarize"]


def summarize(
    plan: "Plan",
    parts: Sequence[PartSummary],
    seconds: float,
    *,
    started_at: float = 0.0,
    predicted: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the fields that the README lists.

    seconds: from joining or starting Ray, at the Unix time `started_at`, to the last part on disk."""
    captioned = sum(part.captioned for part in parts)
    failed = sum((Counter(part.failed_by_reason) for part in parts), Counter[str]())
    num_tokens = sum(part.num_tokens for part in parts)
    read = captioned + failed.total()
    readings = [reading for part in parts for reading in part.clocks]
    waited, first_at = waited_share(readings), first_caption_at(readings)
    return {
        "read": read,
        "captioned": captioned,
        "failed": failed.total(),
        "failed_by_reason": dict(failed),
        "skipped_done": plan.num_skipped,
        "seconds": round(seconds, 2),
        "images_per_s": round(read / seconds, 2) if seconds else 0.0,
        "tokens_per_s": round(num_tokens / seconds, 2) if seconds else 0.0,
        "model_waited_share": None if waited is None else round(waited, 4),
        "first_caption_s": None if first_at is None else round(first_at - started_at, 2),
        "predicted": predicted,
        "output": redact(plan.table.url),
    }


def predicted(plan: "Plan", allocation: Allocation, cluster: Cluster, num_images: int) -> dict[str, float] | None:
    """Return what `jobs/plan.py` makes of a job like this one, if it was run for this output.

    None where it was run for another model, device, decoding, scoring, image or number of slots."""
    costs = kept(plan.table.store, plan.table.url)
    if costs is None or not _is_of(costs, plan, allocation):
        return None
    shared_cpus = None if cluster.can_grow else cluster.cpus
    found = predict(costs, allocation, num_images, shared_cpus=shared_cpus)
    seconds = found.seconds or 0.0
    return {"seconds": round(seconds, 2), "images_per_s": round(num_images / seconds, 2)} if seconds else None


def _is_of(costs: Costs, plan: "Plan", allocation: Allocation) -> bool:
    is_on_gpu = allocation.worker_gpus > 0
    is_same = (costs.fingerprint, costs.settings) == (plan.model.fingerprint, settings_digest(plan.config))
    return is_same and (costs.device != "cpu") == is_on_gpu


def planned(plan: "Plan") -> dict[str, Any]:
    """Return the summary of a dry run."""
    return {
        "dry_run": True,
        "images": plan.frozen.num_images,
        "units": len(plan.frozen.units),
        "left": plan.num_left,
        "skipped_done": plan.num_skipped,
        "model": plan.model.name,
        "output": redact(plan.table.url),
    }


def facts(plan: "Plan", allocation: Allocation) -> dict[str, Any]:
    """Return what `_run/runs/` keeps of this invocation; options of stores may hold secrets and are left out."""
    config = asdict(plan.config)
    for name in ("storage_options", "output_storage_options"):
        config["input"][name] = sorted(config["input"][name] or {})
    config["input_path"], config["output"] = redact(plan.config.input_path), redact(plan.config.output)
    packages = ("ray", "torch", "transformers", "pyarrow", "pillow")
    return {
        "config": config,
        "model": {"name": plan.model.name, "fingerprint": plan.model.fingerprint},
        "allocation": asdict(allocation),
        "versions": {"captioner": __version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def farewell(plan: "Plan", summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a person wants to see at the end: some captions, and what to type next."""
    output = redact(plan.table.url)
    if not summary["read"]:
        yield f"nothing was left to do: {plan.num_skipped:,} images were done already, and no part was changed"
    if summary.get("first_caption_s") is not None:
        yield f"took      {summary['seconds']:g} s, the first captions {summary['first_caption_s']:g} s after the start"
    if summary.get("predicted"):
        yield f"planned   {summary['predicted']['seconds']:g} s, by jobs/plan.py"
    for row in plan.table.sample(5):
        yield _visible(f"  {row['image_id'].rpartition('/')[2]:24} {row['caption']}")
    yield f"table     {output}/captions (read it with pandas.read_parquet), failures beside it"
    yield f"next      python jobs/verify.py {output}"
    if plan.config.model.model == "demo":
        yield "          python jobs/caption.py IMAGES OUTPUT --model BUNDLE"


def _visible(text: str) -> str:
    """Return a line of strangers' words for a terminal: without what would move its cursor or change its title."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
