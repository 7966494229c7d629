"""Fit a projector on labelled images: python jobs/fit_projector.py LABELS OUTPUT_BUNDLE --model BUNDLE."""

import sys

from captioner.commands import main

if __name__ == "__main__":
    sys.exit(main("fit_projector"))
