"""The outcome of a fit: the bundle with its provenance, the summary, the closing lines.

Knows the plan and the last state; nothing of how a fit runs.
"""

import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from torch import Tensor

from captioner import __version__
from captioner.config import LabelsConfig
from captioner.model.adapter import AdapterConfig
from captioner.model.bundle import describe, read_parts, save_as_llava, save_bundle
from captioner.model.projector import build_projector
from captioner.storage.urls import redact
from captioner.terminal import command
from captioner.training.features.examples import FeatureSet
from captioner.training.fit.fit_plan import FitPlan
from captioner.training.fit.fit_state import Best, FitState, best_of

__all__ = ["closing_lines", "dry_run_summary", "save_fitted_bundle", "save_llava", "summarize"]


def save_fitted_bundle(plan: FitPlan, features: FeatureSet, state: FitState) -> None:
    """Write the bundle with the best weights: it appears when all of it is there."""
    best = best_of(state)
    learnt = {name: weight for name, weight in best.weights.items() if "lora_" in name}
    projector = build_projector(plan.start.projector)
    projector.load_state_dict({name: weight for name, weight in best.weights.items() if name not in learnt})
    save_bundle(
        plan.output.url,
        projector,
        plan.start.projector,
        clip=plan.start.clip,
        llama=plan.start.llama,
        checkpoint=plan.start.checkpoint,
        template=plan.start.template,
        adapter=_adapter(plan, learnt),
        carries_models=plan.config.target.carry_models,
        provenance=_provenance(plan, features, state, best),
        storage_options=plan.model_options,
    )


def _adapter(plan: FitPlan, learnt: Mapping[str, Tensor]) -> tuple[AdapterConfig, Mapping[str, Tensor]] | None:
    """Return the adapter that was fitted, or that of the model, which has stayed as it was."""
    config = plan.start.adapter
    if config is None or learnt:
        return None if config is None else (config, learnt)
    start = read_parts(plan.output.initial_bundle_url, plan.model_options or None, allow_remote_parts=True)
    assert start.adapter is not None, "the bundle that the fit began with has an adapter"
    return config, start.adapter.tensors()


def save_llava(plan: FitPlan) -> None:
    """Write the bundle as transformers' LLaVA, where that is asked for and not there yet."""
    if plan.config.target.save_as and not plan.output.has_llava:
        options = plan.model_options or None
        save_as_llava(plan.output.url, plan.output.llava_url, storage_options=options, allow_remote_parts=True)


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


def dry_run_summary(plan: FitPlan) -> dict[str, Any]:
    """Return the summary of a dry run."""
    counts = plan.labels.counts()
    return {
        "dry_run": True,
        "images": {name: count.num_images for name, count in counts.items()},
        "captions": {name: count.num_captions for name, count in counts.items()},
        "features_missing": len(plan.features.missing),
        "bytes_to_copy": plan.features.bytes_to_keep,
        "steps": plan.num_steps,
        "output": redact(plan.output.url),
    }


def summarize(plan: FitPlan) -> dict[str, Any]:
    """Return the summary of a fit that is done, from its bundle."""
    bundle = describe(plan.output.url, plan.model_options or None, allow_remote_parts=True)
    provenance = bundle.provenance
    return {
        "steps": provenance["steps"],
        "best_step": provenance["best_step"],
        **provenance["metrics"],
        "images": {name: count["num_images"] for name, count in provenance["data"]["splits"].items()},
        "left_out": provenance["data"]["left_out"],
        "fingerprint": bundle.fingerprint,
        "seconds": 0.0,
        "output": redact(plan.output.url),
    }


def _changed(plan: FitPlan) -> Iterator[str]:
    data = describe(plan.output.url, plan.model_options or None, allow_remote_parts=True).provenance["data"]
    if data["versions"] != plan.features.fingerprint:
        yield "images have changed since the fit: to fit on them as they are now, choose another OUTPUT_BUNDLE"


def closing_lines(plan: FitPlan, summary: Mapping[str, Any]) -> Iterator[str]:
    """Yield the last lines for a person: figures, where to look, what to type next."""
    output = redact(plan.output.url)
    if not summary["seconds"]:
        yield "nothing was left to do: this fit had ended"
        yield from _changed(plan)
    names = ("val_loss", "cider_d", "bleu_4")
    figures = ", ".join(f"{name} {summary[name]:.3f}" for name in names if name in summary)
    yield f"bundle    {output} (weights of step {summary['best_step']:,}{': ' + figures if figures else ''})"
    if plan.config.target.save_as:
        yield f"llava     {redact(plan.output.llava_url)}"
    yield f"look at   {output}/_run/curves.svg, validation.html, metrics.jsonl"
    yield f"next      {command('caption')} IMAGES CAPTIONS {shlex.join(['--model', output])}"
    yield f"          {command('evaluate')} CAPTIONS REFERENCES"
