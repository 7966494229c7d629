"""The fit: plan it, run it on Ray, say what came of it.

Imports torch and Ray once OUTPUT and LABELS are known to be there, so that a wrong path is refused at once. What runs
on Ray is in `fit_stream`.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from tempfile import TemporaryDirectory
from typing import Any

from captioner.config import FitConfig
from captioner.model.light_imports import import_transformers
from captioner.storage.faults import output_errors
from captioner.terminal import say
from captioner.training.fit.fit_output import FitOutput
from captioner.training.fit.fit_plan import FitPlan, open_output, plan_fit
from captioner.training.labels.label_files import check_labels

__all__ = ["fit_projector"]


def fit_projector(config: FitConfig) -> Mapping[str, Any]:
    """Fit a projector, or for a dry run print the plan; return the summary.

    Raises UsageError before anything is started for what cannot run, JobError when the job itself fails.
    """
    with output_errors(config.target.output), _run_folder(config) as (output, run_folder), ExitStack() as held:
        check_labels(config.labels)
        take_lease = (lambda: None) if config.dry_run else lambda: held.enter_context(output.take_lease())
        plan = plan_fit(config, output, run_folder, take_lease)
        import_transformers()
        from captioner.training.fit.fit_price import fit_prices, price_lines
        from captioner.training.fit.fit_report import (
            closing_lines,
            dry_run_summary,
            save_llava,
            summarize,
        )  # it brings torch

        say(plan.lines())
        if config.dry_run:
            prices = fit_prices(plan)
            say(price_lines(prices))
            return {**dry_run_summary(plan), "prices": prices}
        with redirect_stdout(sys.stderr):  # Ray prints what happens to workers on stdout
            summary = summarize(plan) if output.has_bundle else _run(plan)
            save_llava(plan)
        say(closing_lines(plan, summary))
    return summary


def _run(plan: FitPlan) -> dict[str, Any]:
    from captioner.cluster.fit_stream import run  # here, not above: it brings Ray

    return run(plan)


@contextmanager
def _run_folder(config: FitConfig) -> Iterator[tuple[FitOutput, str]]:
    """Yield the output, and the folder for what is learnt about the labels: a dry run leaves nothing."""
    output = open_output(config)
    if not config.dry_run:
        yield output, output.run_folder
        return
    with TemporaryDirectory() as folder:
        yield output, folder
