"""Which names are those of images and of tars. In a folder, an image is

a file with the suffix of a format that `images.formats` reads, or of HEIC or JPEG XL, which become rejects by name;
a file without a suffix, as stores of hashes have, unless its name is one that texts beside data have.

In a tar such texts, README.md and its like, and what macOS adds are no samples.
"""

__all__ = ["IMAGE_SUFFIXES", "TAR_SUFFIXES", "is_beside_samples", "is_image_name", "is_text_name"]

_IMAGE_ENDINGS = (
    "jpg jpeg jpe jfif mpo png apng webp gif tif tiff bmp dib rle avif avifs heic heif hif jxl jp2 j2k j2c jpc jpf jpx"
    " ico cur icns ppm pgm pbm pnm pfm tga icb vda vst pcx dcx sgi rgb rgba bw ras sun im1 im8 im24 im32 dds ftc ftu"
    " psd qoi xbm xpm msp fli flc blp gbr pxr spider spi"
)
IMAGE_SUFFIXES = frozenset("." + ending for ending in _IMAGE_ENDINGS.split())
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_TEXTS = (
    "readme license licence copying copyright notice authors contributors maintainers codeowners changelog changes"
    " history news todo install version manifest citation makefile dockerfile jenkinsfile procfile gemfile rakefile"
    " md5sums sha1sums sha256sums checksums"
)
_TEXT_NAMES = frozenset(_TEXTS.split())
_PAGES = frozenset({"readme", "license", "licence", "copying", "contributing", "changelog"})
_PAGE_SUFFIXES = frozenset({"md", "txt", "rst"})


def is_image_name(name: str) -> bool:
    """Return whether a file's name ends as that of an image."""
    return name.lower().endswith(tuple(IMAGE_SUFFIXES))


def is_text_name(name: str) -> bool:
    """Return whether a name without a suffix is one that texts beside data have, as README; in any case."""
    return name.lower() in _TEXT_NAMES


def is_beside_samples(name: str) -> bool:
    """Return whether a tar's member is a text about its data, as README or LICENSE.txt, or a file that macOS adds."""
    *folders, base = name.split("/")
    stem, _, ending = base.lower().partition(".")
    is_page = (stem in _PAGES and ending in _PAGE_SUFFIXES) or (not ending and is_text_name(stem))
    return is_page or base.startswith("._") or base == ".DS_Store" or "__MACOSX" in folders
