"""The rungs of the ladder, each fitted, captioned and judged by the commands that a user types."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow.dataset as ds

from tests.bench.ladder.world import Crowd, share_of_statements

JOBS = Path(__file__).parents[3] / "jobs"
_PATCHES = ("--image-features", "patches")
_MLP = ("--projector", "mlp")
RUNGS = {
    "linear-1": (),
    "mlp-1": _MLP,
    "8 queries": (*_PATCHES, "--projector", "query", "--image-tokens", "8"),
    "16 queries": (*_PATCHES, "--projector", "query", "--image-tokens", "16"),
    "64 patches": (*_PATCHES, *_MLP),
    "64 patches + LoRA": (*_PATCHES, *_MLP, "--lora-rank", "8"),
}
"""Name -> flags of jobs/fit_projector.py, from few image tokens to many, and last what may change the reader, too."""


@dataclass(frozen=True)
class Accuracy:
    """What is right in the captions of held-out images."""

    captions: float
    """Share of captions that are right from the first word to the last."""

    statements: float
    """Mean share of statements that are right, of those that a caption makes or should make, whichever are more."""


def fit(rung: str, models: tuple[Path, Path], labels: Path, bundle: Path, *flags: str) -> None:
    """Fit the rung's projector between the tower and the language model; a fit that was broken off goes on."""
    clip, llama = map(str, models)
    _job("fit_projector", labels, bundle, "--clip", clip, "--llama", llama, *RUNGS[rung], *flags)


def accuracy(bundle: Path, images: Path, truth: list[Crowd], captions: Path) -> Accuracy:
    """Caption the images, named by their index, and compare with what they show."""
    _job("caption", images, captions, "--model", bundle, "--max-new-tokens", "48")
    rows = ds.dataset(captions / "captions").to_table(["image_id", "caption"]).to_pylist()
    said = {int(Path(row["image_id"]).stem): row["caption"] for row in rows}
    assert len(said) == len(truth), f"{len(said)} captions of {len(truth)} images"
    shares = [share_of_statements(said[index], crowd) for index, crowd in enumerate(truth)]
    exact = [said[index] == crowd.caption for index, crowd in enumerate(truth)]
    return Accuracy(sum(exact) / len(truth), sum(shares) / len(truth))


def _job(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, JOBS / f"{name}.py", *map(str, arguments)], check=True, stdout=sys.stderr)
