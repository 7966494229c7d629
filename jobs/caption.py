"""Caption images into a Parquet table: python jobs/caption.py INPUT OUTPUT --model BUNDLE."""

import sys

from captioner.commands import main

if __name__ == "__main__":
    sys.exit(main("caption"))
