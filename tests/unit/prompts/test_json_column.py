"""The column that a JSON schema makes, and answers as its values."""

from typing import Any

import pyarrow as pa
import pytest

from captioner.prompts import column_type, parse_answer


def an_object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


FLAT = an_object(
    name={"type": "string"},
    count={"type": "integer"},
    share={"type": "number"},
    is_dark={"type": "boolean"},
    kind={"enum": ["photo", "drawing"]},
    tags={"type": "array", "items": {"type": "string"}},
)
TYPE = column_type(FLAT)


def test_a_flat_schema_is_a_struct() -> None:
    assert {field.name: field.type for field in TYPE} == {
        "name": pa.string(),
        "count": pa.int64(),
        "share": pa.float64(),
        "is_dark": pa.bool_(),
        "kind": pa.string(),
        "tags": pa.list_(pa.string()),
    }


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        an_object(),
        an_object(a=an_object(b={"type": "string"})),
        an_object(a={"type": ["string", "null"]}),
        an_object(a={"type": "array", "items": {"type": "array", "items": {"type": "string"}}}),
        an_object(a={"enum": [1, "b"]}),
        an_object(a=True),
        an_object(a={"type": "string"}, A={"type": "string"}),  # one name in SQL
        an_object(**{"": {"type": "string"}}),
        {"type": "object", "properties": {"a": {"type": "string"}}},  # others may come
    ],
)
def test_any_other_schema_is_text(schema: dict[str, Any]) -> None:
    assert column_type(schema) == pa.string()


def test_an_answer_is_a_value_of_its_column_with_nulls_for_what_it_lacks() -> None:
    found = parse_answer('{"name": "x", "count": 3, "tags": ["a"]}', TYPE)
    assert found == {"name": "x", "count": 3, "share": None, "is_dark": None, "kind": None, "tags": ["a"]}
    assert pa.array([found, None], TYPE).to_pylist() == [found, None]
    assert parse_answer('{"share": 2}', TYPE)["share"] == 2.0


@pytest.mark.parametrize(
    "text", ["", '{"name": "x', "[1]", '"x"', '{"count": 9223372036854775808}', '{"count": "three"}', "[" * 100_000]
)
def test_an_answer_that_is_cut_off_or_no_such_value_is_null(text: str) -> None:
    assert parse_answer(text, TYPE) is None


def test_an_answer_that_is_text_stays_as_it_is_unless_it_is_cut_off() -> None:
    assert parse_answer('{ "a": {"b": 1}}', pa.string()) == '{ "a": {"b": 1}}'
    assert parse_answer('{"a": {"b"', pa.string()) is None
