"""A job of five prompts, and one that adds a sixth, killed and run again: each column is that of an unbroken run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.faults.running_job import Job, assert_same, num_parts, table, verified, wait_for_parts
from tests.http_server import SlowStore

pytestmark = pytest.mark.slow

Finish = Callable[..., dict[str, Any]]

NUM = 800
PROMPTS = """
caption: "w1"
tags: {text: "w2 {?alt: w3 {alt}}", max_new_tokens: 4, max_value_tokens: 3}
again: {text: "w3", max_new_tokens: 3, redraw_repetitive: 2, temperature: 2.0, trim_to_sentence: true}
drawn: {texts: [w4, {text: w5, weight: 2}], do_sample: true, num_captions: 2}
is_photo: {text: "w6 {alt}", choice: [yes, no], max_new_tokens: 2, max_value_tokens: 5}
"""


@pytest.fixture
def captioned(store: SlowStore, tmp_path: Path) -> tuple[Path, str]:
    """A list of images with their alt texts, every third without one; a file of prompts."""
    lines = [f"{store.url(f'{seed:05d}.jpg')},{f'w{seed % 7} w8 w9' if seed % 3 else ''}" for seed in range(NUM)]
    (tmp_path / "images.csv").write_text("\n".join(["url,alt", *lines]))
    (tmp_path / "prompts.yaml").write_text(PROMPTS)
    return tmp_path / "images.csv", str(tmp_path / "prompts.yaml")


SIXTH = """
long: {texts: [w7, "w8 {alt}"], do_sample: true, max_value_tokens: 3}
"""


def answers(output: Path) -> pd.DataFrame:
    """The rows of a table; of how answers came about, what is no score: these differ in their last bits."""
    rows = table(output)
    for column in output.glob("columns/*"):
        added = pd.read_parquet(column / "answers").set_index("key").drop(columns=["image_id", "run_id"])
        rows = rows.join(added, validate="1:1")
    for name in (column for column in rows if column.endswith("_details")):
        rows[name] = rows[name].map(_told, na_action="ignore")
    return rows


def _told(details: dict[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in details.items() if "logprob" not in name and name != "candidates"}
    candidates = details.get("candidates")
    return told | {"candidates": [] if candidates is None else sorted(one["caption"] for one in candidates)}


def test_a_job_of_five_prompts_that_is_killed_and_run_again_ends_with_the_unbroken_table(
    start: Callable[..., Job], finish: Finish, captioned: tuple[Path, str], store: SlowStore, tmp_path: Path
) -> None:
    images, prompts = captioned
    asked = ("--prompts", prompts, "--rows-per-part", "64")
    assert finish(images, tmp_path / "unbroken", *asked)["read"] == NUM
    output = tmp_path / "table"
    store.hold_after(600)  # more than the two blocks of 256 that one decoder fetches at once: one is whole
    killed = start(images, output, *asked)
    wait_for_parts(killed, output)
    killed.kill_everything()
    assert num_parts(output) > 0
    summary = finish(images, output, *asked)
    assert summary["skipped_done"] > 0
    assert summary["read"] > 0, "the injector came too late to do anything"
    assert set(summary["prompts"]) == {"caption", "tags", "again", "drawn", "is_photo"}
    assert summary["prompts"]["again"]["redrawn"] > 0
    found, expected = answers(output), answers(tmp_path / "unbroken")
    assert_same(found, expected)
    assert set(found["is_photo"].dropna()) <= {"yes", "no"}
    assert found.loc[found["caption"].notna(), "tags"].notna().all()
    verified(str(output), "--compact")
    assert_same(answers(output), expected)


def test_a_sixth_prompt_whose_job_is_killed_and_run_again_ends_with_the_table_of_all_six(
    start: Callable[..., Job], finish: Finish, captioned: tuple[Path, str], store: SlowStore, tmp_path: Path
) -> None:
    images, five = captioned
    six = str(tmp_path / "six.yaml")
    Path(six).write_text(PROMPTS + SIXTH)
    output = tmp_path / "table"
    finish(images, tmp_path / "unbroken", "--prompts", six)
    finish(images, output, "--prompts", five)
    before = {path: path.read_bytes() for path in output.glob("captions/*")}
    store.hold_after(verified(str(output))["captioned"] - 1)  # all that is left but one, so that some block is whole
    killed = start(images, output, "--prompts", six, "--rows-per-part", "64")
    wait_for_parts(killed, output, folder="columns/long/answers")
    killed.kill_everything()
    left = Job([str(output)], script="verify.py").end()
    assert left[0] == 1, "the injector came too late to do anything"
    summary = finish(images, output, "--prompts", six)
    assert 0 < summary["read"] < NUM
    assert set(summary["prompts"]) == {"long"}
    found = verified(str(output))
    assert found["columns"]["long"]["answered"] == found["captioned"]
    assert {path: path.read_bytes() for path in output.glob("captions/*")} == before
    assert_same(answers(output), answers(tmp_path / "unbroken"))
    verified(str(output), "--compact")
    assert_same(answers(output), answers(tmp_path / "unbroken"))
