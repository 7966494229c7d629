"""The one opener of Parquet files: what a file says about its types never runs code."""

import io
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.storage.parquet import open_parquet_file, read_schema

MADE: list[bytes] = []


class _Enemy(pa.ExtensionType):
    """A type that some package has registered, as Ray registers its own."""

    def __init__(self, storage: pa.DataType) -> None:
        super().__init__(storage, "test.enemy")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"of the file"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> "_Enemy":
        MADE.append(serialized)
        return cls(storage)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    pa.register_extension_type(_Enemy(pa.binary()))
    MADE.clear()
    yield
    pa.unregister_extension_type("test.enemy")


def _table() -> pa.Table:
    odd = pa.ExtensionArray.from_storage(_Enemy(pa.binary()), pa.array([b"1", b"2"]))
    return pa.table(
        {
            "plain": odd,
            "list": pa.ListArray.from_arrays([0, 1, 2], odd),
            "struct": pa.StructArray.from_arrays([odd], ["in"]),
            "map": pa.MapArray.from_arrays([0, 1, 2], pa.array(["a", "b"]), odd),
            "large": pa.array(["x", "y"], pa.large_string()),
            "time": pa.array([1, 2], pa.timestamp("ms", "Europe/Berlin")),
        }
    )


def _file(**options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(_table(), buffer, **options)
    return buffer.getvalue()


def _with_footer(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    size = int.from_bytes(data[-8:-4], "little")
    footer = change(data[-8 - size : -8])
    return data[: -8 - size] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def _pair(footer: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Return what stands before the pair of Arrow's schema, its key and its value with their lengths, and the rest."""
    before, key, rest = footer.partition(b"\x0cARROW:schema\x18")
    stop = next(index for index, byte in enumerate(rest) if byte < 0x80) + 1
    stop += sum((byte & 0x7F) << 7 * place for place, byte in enumerate(rest[:stop]))
    assert rest[stop] == 0
    assert before.endswith(b"\x18")
    return before[:-1], key[:-1], rest[:stop], rest[stop:]


def _value_first(footer: bytes) -> bytes:
    before, key, value, rest = _pair(footer)
    return before + b"\x28" + value + b"\x08\x02" + key + rest


def _value_twice(footer: bytes) -> bytes:
    before, key, value, rest = _pair(footer)
    return before + b"\x18" + key + b"\x18\x04AAAA" + b"\x08\x04" + value + rest


def _in_other_base64(footer: bytes) -> bytes:
    before, key, value, rest = _pair(footer)
    return before + b"\x18" + key + b"\x18" + value[:-1] + b"=" + rest


CHANGES = [lambda footer: footer, _value_first, _value_twice, _in_other_base64]


@pytest.mark.parametrize("change", CHANGES, ids=["as written", "value first", "value twice", "other base64"])
@pytest.mark.parametrize("opened", [bytes, io.BytesIO], ids=["bytes", "file"])
def test_no_type_that_a_file_names_is_made(change: Callable[[bytes], bytes], opened: Callable[[bytes], object]) -> None:
    data = _with_footer(_file(), change)
    MADE.clear()
    with open_parquet_file(opened(data)) as file:  # type: ignore[arg-type]
        assert "extension<" not in str(file.schema_arrow)
        assert file.read()["list"].to_pylist() == [[b"1"], [b"2"]]
    assert MADE == []


@pytest.mark.parametrize("change", CHANGES[:3], ids=["as written", "value first", "value twice"])
def test_arrow_itself_makes_it(change: Callable[[bytes], bytes]) -> None:
    """Else the test above would show nothing."""
    data = _with_footer(_file(), change)
    MADE.clear()
    pq.ParquetFile(io.BytesIO(data))
    assert MADE


def test_all_other_types_are_as_they_were_written() -> None:
    with open_parquet_file(_file()) as file:
        kinds = {field.name: field.type for field in file.schema_arrow}
    assert kinds["large"] == pa.large_string()
    assert kinds["time"] == pa.timestamp("ms", "Europe/Berlin")
    assert kinds["plain"] == pa.binary()


def test_a_file_without_extension_types_is_read_as_it_lies() -> None:
    table = pa.table({"number": range(100_000)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=10_000, store_schema=False)
    for source in (buffer.getvalue(), buffer):
        assert open_parquet_file(source).read().equals(table)


def test_a_footer_longer_than_what_is_read_first_is_masked_too() -> None:
    table = _table().append_column("x" * 100_000, pa.array([1, 2]))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    MADE.clear()
    for source in (buffer.getvalue(), buffer):
        assert open_parquet_file(source).read().num_rows == 2
    assert MADE == []


@pytest.mark.parametrize("data", [b"", b"PAR1", b"\xff" * 8, b"PAR1\xff\xff\xff\x7fPAR1", b"\0" * 100])
def test_what_is_no_parquet_is_arrows_error(data: bytes) -> None:
    for source in (data, io.BytesIO(data)):
        with pytest.raises(pa.ArrowInvalid):
            open_parquet_file(source)


def test_a_serialized_schema_is_read_without_its_extension_types() -> None:
    serialized = _table().schema.serialize().to_pybytes()
    assert read_schema(serialized).field("plain").type == pa.binary()
    assert MADE == []
