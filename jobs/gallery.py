"""Show captions beside their images, on one page: python jobs/gallery.py TABLE OUT.html."""

import sys

from captioner.commands import main

if __name__ == "__main__":
    sys.exit(main("gallery"))
