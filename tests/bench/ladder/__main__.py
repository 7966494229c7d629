"""Does a fit with more image tokens describe more, where one token is not enough?

    nice -n 10 python -m tests.bench.ladder WORK [--rungs "linear-1,16 queries"] [--steps 300]

A world of two to five shapes in nine places (`world`), a tower that sees patches and gist (`tower`) and a language
model that reads one token or many (`language`) are made once in the folder WORK, without any download; each rung is
then fitted from random weights by `jobs/fit_projector.py` with the same data, seed and steps, captions held-out images
by `jobs/caption.py`, and is judged by what their captions say. What stands in WORK is used again, so a run that was
ended goes on. A table for people, last line JSON.
"""

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from tests.bench.ladder import language, tower
from tests.bench.ladder.fits import RUNGS, Accuracy, accuracy, fit
from tests.bench.ladder.world import crowds, write_folder
from tests.bench.report import at_least, last_line

COUNTS = {"train": 8000, "validation": 300, "test": 500}
RECOVERED = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of everything that is made; what is there is used again")
    parser.add_argument("--rungs", default=",".join(RUNGS))
    parser.add_argument("--language-steps", type=int, default=1200)
    parser.add_argument("--tower-steps", type=int, default=1600)
    parser.add_argument("--steps", type=int, default=600, help="of each fit, of 64 captions")
    given = parser.parse_args()
    models = make_models(given.work, given.language_steps, given.tower_steps)
    labels = given.work / "images" / "labels.jsonl"
    if not labels.exists():
        write_folder(labels.parent, COUNTS)
    found = {rung: climb(rung, models, labels, given.work, given.steps) for rung in given.rungs.split(",")}
    print(last_line("ladder", targets(found), values={rung: asdict(figures) for rung, figures in found.items()}))


def make_models(work: Path, language_steps: int, tower_steps: int) -> tuple[Path, Path]:
    """Return the folders of the tower and of the language model, trained now where they are not there."""
    torch.set_num_threads(1)
    clip, llama = work / "clip", work / "llama"
    if not (clip / "preprocessor_config.json").exists():
        tower.train(clip, 20_000, tower_steps)
    if not (llama / "tokenizer.json").exists():
        language.train(llama, language_steps)
    return clip, llama


def climb(rung: str, models: tuple[Path, Path], labels: Path, work: Path, num_steps: int) -> Accuracy:
    """Fit and judge one rung, or read what is known of it."""
    folder = work / rung.replace(" ", "-")
    known = folder / "accuracy.json"
    if not known.exists():
        settings = ("--batch-size", "64", "--max-steps", str(num_steps), "--learning-rate", "1e-2")
        measured = ("--num-scored-images", "0", "--eval-every", str(max(1, num_steps // 4)))
        fit(rung, models, labels, folder / "bundle", *settings, *measured)
        truth = list(crowds("test", COUNTS["test"]))
        figures = accuracy(folder / "bundle", labels.parent / "test", truth, folder / "captions")
        known.write_text(json.dumps(asdict(figures)))
    found = Accuracy(**json.loads(known.read_text()))
    print(f"{rung:18} captions right {found.captions:6.1%}   statements right {found.statements:6.1%}", file=sys.stderr)
    return found


def targets(found: dict[str, Accuracy]) -> dict[str, dict[str, object]]:
    """Return whether each rung is above the one before, and what 16 tokens recover of what all patches gain."""
    ladder = [found[rung].statements for rung in RUNGS if rung in found]
    rises = [above - below for below, above in itertools.pairwise(ladder)]
    steps = {"smallest_rise": at_least(min(rises, default=0.0), 0.0)}
    if {"linear-1", "16 queries", "64 patches"} <= set(found):
        one, some, every = (found[rung].captions for rung in ("linear-1", "16 queries", "64 patches"))
        steps["recovered_by_16"] = at_least((some - one) / (every - one), RECOVERED)
    return steps


if __name__ == "__main__":
    main()
