"""Look at captions beside their pictures, on one page: python jobs/gallery.py TABLE OUT.html."""

import sys

from captioner.command_line import run
from captioner.config import GalleryConfig
from captioner.gallery_job import gallery

if __name__ == "__main__":
    sys.exit(run(GalleryConfig, gallery, continues=False))
