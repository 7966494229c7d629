"""A fit that dies at any change of what it writes leaves nothing stuck, nothing lost and nothing doubled.

Without Ray and without a step: what its driver and its workers write is written here, one file after the other.
"""

import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from captioner.command_line import parse
from captioner.config import FitConfig
from captioner.errors import OutputError
from captioner.training.features.features import feature_schema
from captioner.training.fit.fit_plan import FitPlan, open_output, plan_fit
from captioner.training.fit.initial_bundle import save_initial_bundle
from tests.faults.crashes import Moment, crashing
from tests.labelled_scenes import write_labels
from tests.unit.model import tiny_models

MOMENTS: tuple[Moment, ...] = ("before", "half", "after")
NUM_IMAGES = 8


class Fit:
    """Labels, models, and the folder of a fit."""

    def __init__(self, folder: Path) -> None:
        self.output = folder / "out"
        labels = write_labels(folder, {"train": 6, "validation": 2})
        parts = tiny_models.save_clip(folder / "clip"), tiny_models.save_llama(folder / "llama")
        flags = [str(labels), str(self.output), "--clip", str(parts[0]), "--llama", str(parts[1])]
        self.config = parse(FitConfig, flags)

    def run(self) -> FitPlan:
        """What `jobs/fit_projector.py` writes."""
        output = open_output(self.config)
        with output.take_lease():
            plan = plan_fit(self.config, output, output.run_folder)
            output.claim(plan.identity)
            save_initial_bundle(plan.config, output.initial_bundle_url, plan.model_options)
            with plan.features.computing():
                for piece in plan.features.slices() if len(plan.features.missing) else []:
                    for rows in plan.features.reader.read(piece):
                        for start in range(0, rows.num_rows, 3):  # a task each
                            plan.features.cache.write(featured(rows.slice(start, 3)))
            output.write("checkpoint.pt", b"weights")
        return plan

    def check(self) -> None:
        """The folder is that of an unbroken fit, and nothing else is left."""
        self.run()
        plan = self.run()
        assert not len(plan.features.missing)
        again = plan.features.cache.index().rows
        assert Counter(again["source"].to_pylist()).keys() == Counter(plan.labels.table["source"].to_pylist()).keys()
        files = [path for path in self.output.rglob("*") if path.is_file()]
        assert not [path for path in files if path.name.endswith(".tmp") or path.parent.name == "listing"]
        assert open_output(self.config).read("checkpoint.pt") == b"weights"


def featured(rows: pa.Table) -> pa.Table:
    """Return rows as a FeatureWorker returns them, with made-up features."""
    width = tiny_models.CLIP_WIDTH
    numbers = pa.array(np.ones(width * rows.num_rows, np.float16))
    kind = feature_schema(width).field("features").type
    return rows.append_column("features", pa.FixedSizeListArray.from_arrays(numbers, type=kind))


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return Fit(tmp_path_factory.mktemp("fit"))


def test_two_fits_do_not_write_one_folder(fit: Fit) -> None:
    shutil.rmtree(fit.output, ignore_errors=True)
    with (
        open_output(fit.config).take_lease(),
        pytest.raises(OutputError, match=r"out is in use: fit run .* by process .*; expected no other job on it"),
        open_output(fit.config).take_lease(),
    ):
        pass
    fit.check()


def test_a_fit_that_dies_at_any_change_is_continued_by_the_next(fit: Fit) -> None:
    shutil.rmtree(fit.output, ignore_errors=True)
    with crashing(None) as whole:
        fit.run()
    assert whole.num_changes > 8
    for at, moment in product(range(1, whole.num_changes + 1), MOMENTS):
        if (at + MOMENTS.index(moment)) % 3:
            continue  # each change at one of the moments
        shutil.rmtree(fit.output)
        with crashing(at, moment) as crash:
            fit.run()
        assert crash.is_dead
        fit.check()
