"""What comes of a fit: the bundle with its provenance, a page of validation images, the summary, the last words.

Knows the plan and the last state; nothing of how it came about.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from captioner import __version__
from captioner.config import ImageConfig, LabelsConfig
from captioner.examples import Examples, FeatureSet
from captioner.fit_plan import FitPlan
from captioner.fitting.state import Best, FitState
from captioner.gallery import Card, Page, Text, write_page
from captioner.gallery.pictures import Picture, thumbnails
from captioner.images.thumbnails import Thumbnailer
from captioner.labels import Labels
from captioner.model.bundle import describe, save_bundle
from captioner.model.projector import build_projector
from captioner.rows import Reject, RejectReason
from captioner.sources import Fetcher
from captioner.sources.urls import join, redact
from captioner.table_images import TableImages

__all__ = ["farewell", "planned", "save_result", "summarize"]

_SHOWN_IMAGES = 60
_PICTURE = ImageConfig(fetch_timeout_s=20, fetch_retries=2)  # a page can do without one
_SIDE_PX, _PICTURE_BYTES = 320, 32 << 10


def save_result(plan: FitPlan, features: FeatureSet, state: FitState) -> None:
    """Write the page of validation images, then the bundle with the best weights: it appears when all is done."""
    best = state.best
    assert best is not None, "a fit ends with an evaluation"
    _write_page(plan, features.measured(plan.config.training), best)
    projector = build_projector(plan.start.projector)
    projector.load_state_dict(best.weights)
    save_bundle(
        plan.output.url,
        projector,
        plan.start.projector,
        clip=plan.start.clip,
        llama=plan.start.llama,
        template=plan.start.template,
        carries_models=plan.config.target.carry_models,
        provenance=_provenance(plan, features, state, best),
        storage_options=plan.model_options,
    )


def _provenance(plan: FitPlan, features: FeatureSet, state: FitState, best: Best) -> dict[str, Any]:
    config = plan.config
    return {
        "made_by": "jobs/fit_projector.py",
        "data": {
            "labels": redact(config.labels.labels_path),
            "fingerprint": plan.labels.fingerprint,
            "examples": features.fingerprint,
            "versions": plan.features.fingerprint,
            "splits": {name: count._asdict() for name, count in features.counts.items()},
            "left_out": {**features.failed, **plan.labels.left_out},
        },
        "config": {
            "labels": _without_secrets(config.labels),
            "image": asdict(config.image),
            "training": asdict(config.training),
            "dtype": config.model.dtype,
        },
        "metrics": {name: round(value, 6) for name, value in best.figures.items()},
        "best_step": best.step,
        "steps": state.step,
        "stopped_early": state.is_stopped,
        "versions": {"captioner": __version__}
        | {name: version(name) for name in ("ray", "torch", "transformers", "pillow")},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _without_secrets(config: LabelsConfig) -> dict[str, Any]:
    """Return what chose the examples and their splits, without credentials."""
    kept = {name: value for name, value in asdict(config).items() if name != "storage_options"}
    return {name: redact(value) if isinstance(value, str) else value for name, value in kept.items()}


# The page


def _write_page(plan: FitPlan, examples: Examples, best: Best) -> None:
    """Write validation images with what was written for them and what was to be written."""
    shown = min(_SHOWN_IMAGES, len(best.captions))
    if not shown:
        return
    ids = examples.image_ids[:shown]
    pictures = _pictures(plan.labels, ids, plan.features.run_folder, plan.output.storage_options)
    cards = [
        Card(
            image_id=image_id,
            picture=pictures[image_id],
            texts=[Text.of(written), *(Text.of(text, "reference") for text in references)],
        )
        for image_id, written, references in zip(ids, best.captions, examples.captions, strict=False)
    ]
    figures = ", ".join(f"{name} {value:.3f}" for name, value in best.figures.items())
    lines = [f"After step {best.step:,}: {figures}.", f"{shown} of the validation images, drawn by lot."]
    page = Page(title=f"Validation images of {plan.output.name}", cards=cards, lines=lines)
    write_page(page, join(plan.output.run_folder, "validation.html"), plan.output.storage_options)


def _pictures(
    labels: Labels, image_ids: Sequence[str], run_folder: str, options: Mapping[str, Any]
) -> dict[str, Picture]:
    """Return a thumbnail of each image, or why there is none."""
    rows = labels.table.filter(pc.is_in(labels.table["image_id"], pa.array(image_ids))).to_pylist()
    if labels.frozen is not None:
        images = TableImages(
            frozen=labels.frozen,
            input_path=labels.location,
            run_folder=join(run_folder, "labels"),
            table_options=options,
            access=labels.access,
        )
        found = thumbnails(images, [row["key"] for row in rows])
        return {row["image_id"]: found[row["key"]] for row in rows}
    fetched = Fetcher(labels.location, labels.access, _PICTURE).fetch([row["uri"] for row in rows])
    with Thumbnailer(_PICTURE, side=_SIDE_PX, max_bytes=_PICTURE_BYTES) as thumbnailer:
        made = thumbnailer.make_all(fetched)
    gone = dict.fromkeys(image_ids, Reject(RejectReason.MISSING, "the labels have no such image any more"))
    return gone | dict(zip((row["image_id"] for row in rows), made, strict=True))


# What is said


def planned(plan: FitPlan) -> dict[str, Any]:
    """Return the summary of a dry run."""
    counts = plan.labels.counts()
    return {
        "dry_run": True,
        "images": {name: count.num_images for name, count in counts.items()},
        "captions": {name: count.num_captions for name, count in counts.items()},
        "features_missing": len(plan.features.missing),
        "steps": plan.num_steps,
        "output": redact(plan.output.url),
    }


def summarize(plan: FitPlan) -> dict[str, Any]:
    """Return the summary of a fit that is done, from its bundle."""
    bundle = describe(plan.output.url, plan.model_options or None)
    told = bundle.provenance
    return {
        "steps": told["steps"],
        "best_step": told["best_step"],
        **told["metrics"],
        "images": {name: count["num_images"] for name, count in told["data"]["splits"].items()},
        "left_out": told["data"]["left_out"],
        "fingerprint": bundle.fingerprint,
        "seconds": 0.0,
        "output": redact(plan.output.url),
    }


def _changed(plan: FitPlan) -> Iterator[str]:
    data = describe(plan.output.url, plan.model_options or None).provenance["data"]
    if data["versions"] != plan.features.fingerprint:
        yield "images have changed since: to learn from them as they are, choose another OUTPUT_BUNDLE"


def farewell(plan: FitPlan, summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a person wants to see at the end: figures, where to look, what to type next."""
    output = redact(plan.output.url)
    if not summary["seconds"]:
        yield "nothing was left to do: this fit had ended"
        yield from _changed(plan)
    names = ("val_loss", "cider_d", "bleu_4")
    figures = ", ".join(f"{name} {summary[name]:.3f}" for name in names if name in summary)
    yield f"bundle    {output} (weights of step {summary['best_step']:,}{': ' + figures if figures else ''})"
    yield f"look at   {output}/_run/curves.svg, validation.html, metrics.jsonl"
    yield f"next      python jobs/caption.py IMAGES CAPTIONS --model {output}"
    yield "          python jobs/evaluate.py CAPTIONS REFERENCES"
