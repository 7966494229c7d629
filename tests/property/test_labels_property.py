"""Splits: whatever the rows, no image is in two; and an image's split depends on nothing but itself."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from captioner.config import LabelsConfig
from captioner.errors import InputError
from captioner.training.labels.labels import read_labels
from captioner.training.labels.splits import random_split, split_named
from tests.hypothesis_profiles import max_examples

NAMES = st.sampled_from([f"{name}.jpg" for name in "abcdefghij"])
ROWS = st.lists(
    st.fixed_dictionaries(
        {"image": NAMES, "caption": st.sampled_from(["a dog", "two cars", "", "a cat"])},
        optional={"split": st.sampled_from(["train", "val", "test", "restval", ""])},
    ),
    max_size=20,
)


def read(rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        config = LabelsConfig(labels_path=str(path), max_failed_share=1, **options)
        return list(read_labels(config, folder).table.select(["image_id", "captions", "split"]).to_pylist())


def read_or_error(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    try:
        return read(rows), ""
    except InputError as error:
        return [], str(error)


@max_examples(100)
@given(ROWS)
def test_no_image_is_in_two_splits_and_no_caption_is_lost_or_moved(rows: list[dict[str, Any]]) -> None:
    named: dict[str, set[str | None]] = {}
    captions: dict[str, list[str]] = {}
    for row in rows:
        named.setdefault(row["image"], set()).update({split_named(row.get("split", ""))} - {None})
        captions.setdefault(row["image"], []).extend(filter(None, [row["caption"]]))
    is_contradictory = any(len(splits) > 1 for splits in named.values())
    found, error = read_or_error(rows)
    if error:
        assert is_contradictory or "no image of the split train" in error
        return
    assert not is_contradictory
    assert {row["image_id"]: row["captions"] for row in found} == {name: own for name, own in captions.items() if own}
    assert len(found) == len({row["image_id"] for row in found})
    for row in found:
        seen = named[row["image_id"]]
        assert row["split"] in seen or not seen or (seen == {"train"} and row["split"] == "validation")


@max_examples(100)
@given(st.sets(st.text(min_size=1), min_size=1), st.integers(0, 3), st.floats(0, 0.4), st.floats(0, 0.4))
def test_a_split_follows_from_name_seed_and_shares_alone(
    names: set[str], seed: int, validation_share: float, test_share: float
) -> None:
    for name in names:
        split = random_split(name, seed=seed, validation_share=validation_share, test_share=test_share)
        wider = random_split(name, seed=seed, validation_share=validation_share + 0.1, test_share=test_share + 0.1)
        assert split in {"train", wider}  # a larger share takes images from train, and gives none back


def test_adding_an_image_moves_no_other_to_another_split(tmp_path: Path) -> None:
    rows = [{"image": f"{number}.jpg", "caption": "x"} for number in range(300)]
    before = {row["image_id"]: row["split"] for row in read(rows)}
    after = {row["image_id"]: row["split"] for row in read([{"image": "new.jpg", "caption": "x"}, *reversed(rows)])}
    assert {name: after[name] for name in before} == before
    assert set(before.values()) == {"train", "validation", "test"}
    other = {row["image_id"]: row["split"] for row in read(rows, split_seed=1)}
    assert other != before


def test_splits_have_their_shares_on_average() -> None:
    drawn = [random_split(str(n), seed=0, validation_share=0.2, test_share=0.1) for n in range(20_000)]
    assert abs(drawn.count("validation") / 20_000 - 0.2) < 0.01
    assert abs(drawn.count("test") / 20_000 - 0.1) < 0.01
