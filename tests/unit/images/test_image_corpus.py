"""Files as the field has them: what is expected of each stands in the corpus, beside the script that makes them."""

import csv
import io
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from captioner.config import ImageConfig
from captioner.images import Decoded, Preprocessing, decode
from captioner.schema import Reject, RejectReason

CORPUS = Path(__file__).parent / "corpus"
GREY = Preprocessing(size=30, shortest_edge=30)
OUTCOMES = dict(csv.reader((CORPUS / "outcomes.tsv").read_text().splitlines()[1:], delimiter="\t"))


@pytest.mark.parametrize("is_fast", [False, True], ids=["default", "fast"])
@pytest.mark.parametrize("name", OUTCOMES)
def test_a_file_of_the_field_has_the_outcome_of_its_kind(name: str, is_fast: bool) -> None:
    size = Preprocessing(size=8, shortest_edge=8) if is_fast else GREY  # so small that JPEGs are scaled down
    outcome = decode((CORPUS / "files" / name).read_bytes(), size, ImageConfig(fast_decode=is_fast))
    expected, _, part = OUTCOMES[name].partition(" ")
    if expected == "pixels":
        assert isinstance(outcome, Decoded), outcome
        assert (outcome.width, outcome.height) == (40, 30)
        columns = outcome.pixels.astype(int).mean(axis=(0, 1))
        edges = (45, 194) if is_fast else (45, 190)
        assert columns[0] == pytest.approx(edges[0], abs=12)
        assert columns[-1] == pytest.approx(edges[1], abs=12)
        assert (np.diff(columns) > 0).all()
    else:
        assert isinstance(outcome, Reject), outcome
        assert outcome.reason == expected
        assert part in outcome.detail


def test_the_corpus_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in (CORPUS / "files").iterdir()}
    assert set(files) == set(OUTCOMES)
    assert max(files.values()) < 8192


def test_metadata_that_unpacks_to_very_much_costs_neither_pixels_nor_memory() -> None:
    plain = (CORPUS / "files" / "no_end.png").read_bytes()
    bomb = b"zTXtbomb\0\0" + zlib.compress(bytes(200 << 20))
    chunk = (len(bomb) - 4).to_bytes(4, "big") + bomb + zlib.crc32(bomb).to_bytes(4, "big")
    tracemalloc.start()
    outcome = decode(plain[:33] + chunk + plain[33:], GREY, ImageConfig())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(outcome, Decoded), outcome
    assert most < 16 << 20


@pytest.mark.parametrize("keyword", ["Raw profile type exif", "eXIf"])
def test_a_png_with_too_much_metadata_is_still_turned(keyword: str) -> None:
    exif, info, file = Image.Exif(), PngInfo(), io.BytesIO()
    exif[0x0112] = 6
    info.add_text("workflow", "x" * (3 << 20), zip=True)
    if keyword != "eXIf":
        content = exif.tobytes()
        info.add_text(keyword, f"\nexif\n{len(content):8}\n{content.hex()}\n", zip=True)
    Image.new("RGB", (40, 30)).save(file, "PNG", pnginfo=info, **({"exif": exif} if keyword == "eXIf" else {}))
    outcome = decode(file.getvalue(), GREY, ImageConfig())
    assert isinstance(outcome, Decoded), outcome
    assert (outcome.width, outcome.height) == (30, 40)


@pytest.mark.parametrize("num_bytes", range(3, 40))
def test_a_jpeg_that_lacks_more_than_its_end_is_corrupt(num_bytes: int) -> None:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", quality=95)
    outcome = decode(file.getvalue()[:-num_bytes], GREY, ImageConfig())
    assert isinstance(outcome, Reject), num_bytes
    assert outcome.reason is RejectReason.CORRUPT


def test_a_detail_says_our_limit_of_pixels_alone() -> None:
    file = io.BytesIO()
    Image.new("L", (300, 300)).save(file, "PNG")
    for limit in (40_000, 80_000):
        outcome = decode(file.getvalue(), GREY, ImageConfig(max_image_pixels=limit))
        detail = f"Image size (90000 pixels) exceeds limit; --max-image-pixels is {limit}"
        assert outcome == Reject(RejectReason.TOO_MANY_PIXELS, detail)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"FUJIFILMCCD-RAW 0201", "Fujifilm RAF"),
        (b"IIRO\x08\0\0\0", "Olympus ORF"),
        (b"IIU\0\x18\0\0\0", "Panasonic RW2"),
        (b"II\xbc\1\x20\0\0\0", "JPEG XR"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe", "Radiance HDR"),
        (b"\xabKTX 20\xbb\r\n\x1a\n", "KTX"),
        (b"gimp xcf v011\0", "GIMP XCF"),
        (b"FORM\0\0\0\x40ILBMBMHD", "IFF bitmap"),
        (b"\1\0\0\0" + bytes(36) + b" EMF", "EMF"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "SVG"),
        (b"\0\0\0\x18ftypMiHE\0\0\0\0mif1heic", "HEIF"),
    ],
)
def test_an_image_that_no_decoder_reads_is_unsupported_by_its_name(start: bytes, name: str) -> None:
    outcome = decode(start + bytes(40), GREY, ImageConfig())
    assert isinstance(outcome, Reject)
    assert (outcome.reason, f": {name};" in outcome.detail) == (RejectReason.UNSUPPORTED, True), outcome.detail
