"""What a caption job reports: its record in `_run/runs/` and its summary. Its last lines for people are in `closing`.

Knows the plan and what was written; no Ray.
"""

import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from captioner import __version__
from captioner.captioning.costs import Costs, load_costs, settings_digest
from captioner.captioning.number_format import resolved_dtype
from captioner.captioning.prediction import predict
from captioner.captioning.resources import Allocation, Cluster
from captioner.storage import urls
from captioner.tables import PartSummary
from captioner.tables.clock_readings import first_caption_at, waited_share

if TYPE_CHECKING:
    from captioner.captioning.plan import Plan  # not at run time: it brings the model room, and tasks import this

__all__ = ["dry_run_summary", "prediction_for", "run_record", "summarize"]


def summarize(
    plan: "Plan",
    parts: Sequence[PartSummary],
    seconds: float,
    *,
    started_at: float = 0.0,
    predicted: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return the fields that the guide lists. A table of failures alone is not `ok`.

    seconds: from joining or starting Ray, at the Unix time `started_at`, to the last part on disk."""
    captioned = sum(part.captioned for part in parts)
    failed = sum((Counter(part.failed_by_reason) for part in parts), Counter[str]())
    num_tokens = sum(part.num_tokens for part in parts)
    read = captioned + failed.total()
    readings = [reading for part in parts for reading in part.clocks]
    waited, first_at = waited_share(readings), first_caption_at(readings)
    has_captions = captioned + plan.done.num_captioned > 0
    return {
        "ok": has_captions or not failed.total() + plan.done.num_failed,
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
        **({"prompts": _answer_counts(parts, plan)} if plan.job.prompts or plan.answers else {}),
        "output": str(plan.table.location),
    }


def _answer_counts(parts: Sequence[PartSummary], plan: "Plan") -> dict[str, dict[str, int]]:
    """Return what `prompts.answer_counts` tells of each prompt that is asked, of all this run has written."""
    counts = {prompt.name: Counter(cut=0, null=0) for prompt in plan.prompts}
    for part in parts:
        for name, found in part.answers.items():
            counts.setdefault(name, Counter()).update(found)
    return {name: dict(found) for name, found in counts.items()}


def prediction_for(plan: "Plan", allocation: Allocation, cluster: Cluster, num_images: int) -> dict[str, float] | None:
    """Return what `jobs/plan.py` makes of a job like this one, if it was run for this output.

    None where it was run for another model, device, decoding, scoring, image or number of slots."""
    costs = load_costs(plan.table.store, plan.table.location)
    if costs is None or not _is_of(costs, plan, allocation):
        return None
    shared_cpus = None if cluster.can_grow else cluster.cpus
    found = predict(costs, allocation, num_images, shared_cpus=shared_cpus)
    seconds = found.seconds or 0.0
    return {"seconds": round(seconds, 2), "images_per_s": round(num_images / seconds, 2)} if seconds else None


def _is_of(costs: Costs, plan: "Plan", allocation: Allocation) -> bool:
    is_on_gpu = allocation.worker_gpus > 0
    is_same = (costs.fingerprint, costs.settings) == (
        plan.model.fingerprint,
        settings_digest(plan.config, plan.prompts),
    )
    return is_same and (costs.device != "cpu") == is_on_gpu


def dry_run_summary(plan: "Plan") -> dict[str, Any]:
    """Return the summary of a dry run."""
    return {
        "dry_run": True,
        "images": plan.frozen.num_images,
        "units": len(plan.frozen.units),
        "left": plan.num_left,
        "skipped_done": plan.num_skipped,
        "model": plan.model.name,
        "output": str(plan.table.location),
    }


def run_record(plan: "Plan", allocation: Allocation | None) -> dict[str, Any]:
    """Return what `_run/runs/` keeps of this run; storage options may hold secrets and are left out.

    allocation: None for a run that found nothing to do and asked no worker."""
    config = _shown(asdict(plan.config))
    dtype = {} if allocation is None else {"dtype": resolved_dtype(plan.config.model, allocation.worker_gpus)}
    packages = ("ray", "torch", "transformers", "pyarrow", "pillow")
    return {
        "config": config,
        "model": {
            "name": plan.model.name,
            "fingerprint": plan.model.fingerprint,
            "template": plan.model.template,
            **dtype,
        },
        "allocation": None if allocation is None else asdict(allocation),
        "versions": {"captioner": __version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _shown(value: Any) -> Any:
    """Return what a config holds without credentials: of storage options their names, of URLs what may be shown."""
    if isinstance(value, dict):
        return {
            name: sorted(inner or {}) if name.endswith("storage_options") else _shown(inner)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_shown(inner) for inner in value]
    return urls.shown(value) if isinstance(value, str) else value
