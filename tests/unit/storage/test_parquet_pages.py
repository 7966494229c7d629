"""The headers of pages as a damaged file may have them."""

from captioner.storage.parquet_pages import Page, PageGuard

# Fields 1, 2 and 3 in Thrift's compact protocol, and the end of a struct.
TYPE, SIZE_AS_TRUE, COMPRESSED, STOP = b"\x15\x00", b"\x11", b"\x15\x04", b"\x00"
VALUES_AS_TRUE = b"\x2c\x11\x00"  # field 5: a struct whose first field is true


def test_a_number_of_another_type_is_none_as_thrift_skips_it() -> None:
    pages: list[Page] = []
    guard = PageGuard(on_page=pages.append)
    guard.read(0, TYPE + SIZE_AS_TRUE + COMPRESSED + VALUES_AS_TRUE + STOP + b"ab")
    assert pages == [Page(size_bytes=0, compressed_bytes=2, num_values=0)]
