"""Estimate time, workers and price of a caption job from a small sample: python jobs/plan.py INPUT --model BUNDLE."""

import sys

from captioner.commands import main

if __name__ == "__main__":
    sys.exit(main("plan"))
