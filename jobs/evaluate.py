"""Measure captions against references: python jobs/evaluate.py CAPTIONS REFERENCES."""

import sys

from captioner.commands import main

if __name__ == "__main__":
    sys.exit(main("evaluate"))
