"""Make the pictures of the guide again: python -m tests.pictures

The demo images are captioned in this process, their gallery is opened in Chromium, and what is above the fold is kept
as a small WebP.
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from captioner import Captioner, Reject, demo
from captioner.config import GalleryConfig
from captioner.gallery.gallery_job import gallery
from tests.caption_tables import add_part, begin_table, caption_row
from tests.pages import GUIDE

WINDOW = {"width": 1200, "height": 620}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def make_page(folder: Path) -> Path:
    """Write the gallery of the captioned demo images and return it."""
    names = sorted(path.name for path in demo.images_path().iterdir())
    table, _ = begin_table(str(folder / "captions-demo"), str(demo.images_path()), identity={"input": "demo"})
    rows = []
    with Captioner.from_bundle("demo") as captioner:
        for position, found in enumerate(captioner.caption([demo.images_path() / name for name in names])):
            assert not isinstance(found, Reject)
            scores = {"mean_logprob": found.mean_logprob, "min_logprob": found.min_logprob, "width": 128, "height": 128}
            rows.append(caption_row(position, names[position], found.caption, num_tokens=found.num_tokens, **scores))
    add_part(table, rows)
    page = folder / "page.html"
    gallery(GalleryConfig(table=str(folder / "captions-demo"), output=str(page)))
    return page


def photograph(page: Path) -> Image.Image:
    """Return what a person sees of a page first."""
    executable = next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport=WINDOW, color_scheme="light")
        tab.goto(page.as_uri())
        shot = tab.screenshot()
        browser.close()
    return Image.open(io.BytesIO(shot))


def main() -> None:
    target = GUIDE / "images"
    target.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        photograph(make_page(Path(folder))).save(target / "gallery.webp", quality=80, method=6)
    print(target / "gallery.webp", (target / "gallery.webp").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
