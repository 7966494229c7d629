"""The page of a fit: validation images, the captions that its best weights give them, and their references.

Knows the plan and the best evaluation; nothing of how a fit runs.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from captioner.config import ImageConfig
from captioner.gallery.cards import Card, Text
from captioner.gallery.differences import unmatched
from captioner.gallery.page import Page, write_page
from captioner.gallery.page_images import PageImage, thumbnails
from captioner.images.thumbnails import Thumbnailer
from captioner.inputs import Fetcher
from captioner.schema import Reject, RejectReason
from captioner.storage import Location
from captioner.tables.table_images import TableImages
from captioner.training.features.examples import FeatureSet
from captioner.training.fit.fit_plan import FitPlan
from captioner.training.fit.fit_state import Best
from captioner.training.labels.labels import Labels

__all__ = ["write_fit_page"]

_SHOWN_IMAGES = 60
_IMAGE = ImageConfig(fetch_timeout_s=20, fetch_retries=2)  # a page can do without one
_SIDE_PX, _IMAGE_BYTES = 320, 32 << 10


def write_fit_page(plan: FitPlan, features: FeatureSet, best: Best) -> None:
    """Write `_run/validation.html`: validation images with the captions of the best weights and their references."""
    examples = features.validation_sample(plan.config.training)
    shown = min(_SHOWN_IMAGES, len(best.captions))
    if not shown:
        return
    ids = examples.image_ids[:shown]
    images = _images(plan.labels, ids, Location(plan.features.run_folder, plan.output.storage_options))
    cards = [
        Card(
            image_id=image_id,
            image=images[image_id],
            texts=[Text(unmatched(written, references)), *(Text.of(text, "reference") for text in references)],
        )
        for image_id, written, references in zip(ids, best.captions, examples.captions, strict=False)
    ]
    figures = ", ".join(f"{name} {value:.3f}" for name, value in best.figures.items())
    lines = [
        f"After step {best.step:,}: {figures}.",
        f"{shown} of the validation images, drawn at random. Words of a caption that no reference has are marked.",
    ]
    page = Page(title=f"Validation images of {plan.output.name}", cards=cards, lines=lines)
    write_page(page, Location(plan.output.run_folder, plan.output.storage_options) / "validation.html")


def _images(labels: Labels, image_ids: Sequence[str], run_folder: Location) -> dict[str, PageImage]:
    """Return a thumbnail of each image, or why there is none."""
    rows = labels.table.filter(pc.is_in(labels.table["image_id"], pa.array(image_ids))).to_pylist()
    if labels.frozen is not None:
        images = TableImages(
            frozen=labels.frozen,
            input_path=labels.location,
            named=Location(labels.location),
            run_folder=run_folder / "labels",
            access=labels.access,
        )
        found = thumbnails(images, [row["key"] for row in rows])
        return {row["image_id"]: found[row["key"]] for row in rows}
    fetched = Fetcher(labels.location, labels.access, _IMAGE).fetch([row["uri"] for row in rows])
    with Thumbnailer(_IMAGE, side=_SIDE_PX, max_bytes=_IMAGE_BYTES) as thumbnailer:
        made = thumbnailer.make_all(fetched)
    gone = dict.fromkeys(image_ids, Reject(RejectReason.MISSING, "the labels have no such image any more"))
    return gone | dict(zip((row["image_id"] for row in rows), made, strict=True))
