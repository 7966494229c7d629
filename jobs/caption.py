"""Caption images into a Parquet table: python jobs/caption.py INPUT OUTPUT --model BUNDLE."""

import sys

from captioner.caption_pipeline import caption_images
from captioner.command_line import run
from captioner.config import CaptionJobConfig

if __name__ == "__main__":
    sys.exit(run(CaptionJobConfig, caption_images))
