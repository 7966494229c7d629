"""Tars are those that Python's tarfile writes."""

import io
import tarfile

import pytest

from captioner.export.tar_writer import TarWriter


@pytest.mark.parametrize("sizes", [[], [0], [1, 511, 512, 513], [10_240, 3]])
def test_a_tar_has_the_bytes_of_tarfile(sizes: list[int]) -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    writer = TarWriter(ours)
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, size in enumerate(sizes):
            data, member = bytes([number]) * size, tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = size
            writer.add(member.name, data)
            tar.addfile(member, io.BytesIO(data))
    writer.close()
    assert ours.getvalue() == theirs.getvalue()
