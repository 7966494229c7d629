"""Fit a projector on labelled images: python jobs/fit_projector.py LABELS OUTPUT_BUNDLE --model BUNDLE."""

import sys

from captioner.command_line import run
from captioner.config import FitConfig
from captioner.projector_training import fit_projector

if __name__ == "__main__":
    sys.exit(run(FitConfig, fit_projector))
