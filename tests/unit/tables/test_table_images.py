"""The images behind the rows of a table, read again."""

import tarfile
from io import BytesIO
from pathlib import Path

from captioner.tables.table_images import TableImages
from tests.caption_tables import begin_table


def test_images_of_a_tar_are_read_again_by_the_rule_that_its_rows_were_made_by(tmp_path: Path) -> None:
    """Each image of a sample was a row, and the gallery showed those of other rows."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("README", "v1.0.jpg", "v1.5.jpg", "v2.0.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, BytesIO(name.encode()))
    table, frozen = begin_table(str(tmp_path / "out"), str(tmp_path / "s.tar"), tar_images="all")
    read = TableImages.of(table).rows(frozen.units[0], [2, 1])
    assert [row["data"] for rows in read for row in rows.to_pylist()] == [b"v1.5.jpg", b"v2.0.jpg"]
