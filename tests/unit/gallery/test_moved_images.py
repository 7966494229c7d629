"""`--image-root`: images that lie elsewhere than where the job read them."""

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.config import GalleryConfig, ImageAccessConfig, QueryConfig
from captioner.gallery.gallery_job import gallery
from captioner.gallery.page_images import thumbnails
from captioner.gallery.query_job import query_or_page
from captioner.images.thumbnails import Thumbnail
from captioner.schema import Reject, RejectReason
from captioner.storage import Location
from captioner.tables import CaptionTable
from captioner.tables.moved_images import MovedImages
from captioner.tables.table_images import TableImages
from tests.caption_tables import add_part, begin_table, caption_row
from tests.conftest import Bucket
from tests.sample_images import encoded

INPUTS = [
    "photos",
    "photos/sub/*.jpg",
    "photos/list.csv",
    "photos/table.parquet",
    "photos/uris.parquet",
    "photos/a.tar",
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    image = folder / "sub" / "1.jpg"
    image.write_bytes(encoded())
    (folder / "list.csv").write_text("file_name\nsub/1.jpg\n")
    pq.write_table(pa.table({"image": [encoded()]}), folder / "table.parquet")
    pq.write_table(pa.table({"url": ["sub/1.jpg"]}), folder / "uris.parquet")
    with tarfile.open(folder / "a.tar", "w") as tar:
        tar.add(image, "1.jpg")
    return folder


def table_of(images: Path, output: str, **options: object) -> CaptionTable:
    table, _ = begin_table(output, str(images), **options)  # type: ignore[arg-type]
    return table


@pytest.mark.parametrize("kind", INPUTS)
def test_images_of_a_folder_that_moved_are_found_below_the_new_one(photos: Path, tmp_path: Path, kind: str) -> None:
    table = table_of(tmp_path / kind, str(tmp_path / "out"))
    photos.rename(tmp_path / "elsewhere")
    lost = thumbnails(TableImages.of(table), [0])[0]
    assert isinstance(lost, Reject)
    root = tmp_path / "elsewhere" / ("sub" if "*" in kind else "")
    assert isinstance(thumbnails(TableImages.of(table, ImageAccessConfig(image_root=str(root))), [0])[0], Thumbnail)


def test_a_table_on_a_store_may_be_shown_with_a_local_copy_and_leads_nowhere_else(
    photos: Path, tmp_path: Path, s3: Bucket
) -> None:
    (photos / "secret.txt").write_text("/etc/passwd\nsub/1.jpg\n")
    table = table_of(photos / "secret.txt", f"{s3.url}/table", options=s3.storage_options)
    images = thumbnails(TableImages.of(table, ImageAccessConfig(image_root=str(photos))), [0, 1])
    refused = images[0]
    assert isinstance(refused, Reject)
    assert (refused.reason, refused.detail) == (
        RejectReason.MISSING,
        "/etc/passwd does not lie where the job read its images, in whose place --image-root stands",
    )
    assert isinstance(images[1], Thumbnail)


def test_a_new_place_below_the_old_one_has_the_images_of_their_own_names(tmp_path: Path) -> None:
    images, archive = tmp_path / "data", tmp_path / "data" / "archive"
    for name, size in (("archive/a.jpg", (40, 40)), ("archive/archive/a.jpg", (80, 40))):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(encoded(size=size))
    (images / "a.jpg").write_bytes(encoded(size=(40, 40)))
    table = table_of(images, str(tmp_path / "out"))
    source = TableImages.of(table, ImageAccessConfig(image_root=str(archive)))
    assert source.paths([0, 1])[1] == str(archive / "archive" / "a.jpg")  # 0: a.jpg, 1: archive/a.jpg
    found = thumbnails(source, [0, 1])
    assert [(image.width, image.height) for image in found.values() if isinstance(image, Thumbnail)] == [
        (40, 40),
        (80, 40),
    ]


def test_no_name_leads_out_of_the_folder() -> None:
    moved = MovedImages.of("/data/photos", Location("/copy"))
    assert moved.moved("/data/photos/a/b.jpg") == "/copy/a/b.jpg"
    assert moved.moved("/copy/a.jpg") == "/copy/a.jpg"
    below = MovedImages.of("/data", Location("/data/archive"))
    assert below.moved("/data/archive/a.jpg") == "/data/archive/archive/a.jpg"
    assert below.moved("/data/archive/a.jpg", may_be_new=True) == "/data/archive/a.jpg"
    for url in ("/data/photos/../../etc/passwd", "/etc/passwd", "http://inside/a.jpg", "/data/photos/"):
        assert moved.moved(url) is None, url


def test_a_page_without_one_image_says_how_to_find_them_and_the_flag_does(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("list.csv", "table.parquet", "uris.parquet", "a.tar"):
        (photos / name).unlink()
    table = table_of(photos, str(tmp_path / "out"))
    add_part(table, [caption_row(0, f"{photos}/sub/1.jpg", "a dog")])
    photos.rename(tmp_path / "elsewhere")
    page, moved = (
        str(tmp_path / "page.html"),
        {"image_access": ImageAccessConfig(image_root=str(tmp_path / "elsewhere"))},
    )
    assert gallery(GalleryConfig(table=str(table.location), output=page))["pictures"] == 0
    told = capsys.readouterr().err
    assert f"{photos} was read; if the images lie elsewhere now: --image-root FOLDER" in told
    assert f"page      {page}: 1 card with 0 images" in told
    assert gallery(GalleryConfig(table=str(table.location), output=page, **moved))["pictures"] == 1
    assert query_or_page(QueryConfig(table=str(table.location), review=1, out=page, **moved))["pictures"] == 1
    assert "--image-root" not in capsys.readouterr().err
