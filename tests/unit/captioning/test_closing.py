"""What a caption job says at its end."""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from captioner.captioning.closing import closing_lines, duration, interrupted_text, outcome
from captioner.captioning.job import DEMO_MODEL
from captioner.storage import Location

DONE = {"read": 5_000, "captioned": 4_998, "failed": 2, "failed_by_reason": {"empty": 1, "corrupt": 1}}
DONE |= {"images_per_s": 213.4, "seconds": 23.46, "first_caption_s": 12.25}
PERFECT = DONE | {"captioned": 5_000, "failed": 0, "failed_by_reason": {}}
FAILED = DONE | {"read": 1, "captioned": 0, "failed": 1, "failed_by_reason": {"missing": 1}}
NOTHING = DONE | {"read": 0, "captioned": 0, "failed": 0, "failed_by_reason": {}, "first_caption_s": None}


def plan(folder: Path, num_captioned: int = 0, num_failed: int = 0, **changes: Any) -> Any:
    """A plan as far as the closing lines read it: its table is in `folder`, its done rows are as many as said."""
    location = Location(str(folder), changes.pop("storage_options", {}))
    facts = {
        "table": SimpleNamespace(location=location, run_folder=location / "_run", sample=lambda _: []),
        "done": SimpleNamespace(num_captioned=num_captioned, num_failed=num_failed),
        "frozen": SimpleNamespace(num_further=0),
        "job": SimpleNamespace(reads_demo_images=False, is_demo_model_elsewhere=False),
        "num_skipped": num_captioned + num_failed,
        "num_left": 5_000,
        "families": [SimpleNamespace(prompt="caption")],
        "added_alone": (),
    }
    return SimpleNamespace(**facts | changes)


def test_the_first_line_says_what_became_of_the_images(tmp_path: Path) -> None:
    assert outcome(plan(tmp_path), DONE) == "4,998 captioned, 2 failed (1 corrupt, 1 empty), 213 images/s"
    assert outcome(plan(tmp_path), PERFECT) == "5,000 captioned, none failed, 213 images/s"
    assert next(closing_lines(plan(tmp_path), DONE)) == outcome(plan(tmp_path), DONE)


def test_images_beside_the_first_of_a_row_are_told(tmp_path: Path) -> None:
    lines = list(closing_lines(plan(tmp_path, frozen=SimpleNamespace(num_further=1_204)), DONE))
    assert "left out  1,204 images beside the first in the list of their row: --explode-images takes them" in lines


def test_a_column_that_was_added_is_told_with_the_folder_that_it_lies_in(tmp_path: Path) -> None:
    families = [SimpleNamespace(prompt="caption"), SimpleNamespace(prompt="tags", rows="columns/tags/answers")]
    lines = list(closing_lines(plan(tmp_path, 5_000, families=families, added_alone=("tags",)), PERFECT))
    assert lines[0].startswith("5,000 captioned by tags alone")
    assert f"column    {tmp_path}/columns/tags/answers: tags by key, joined by query, gallery and export" in lines


def test_images_of_earlier_runs_are_told_apart(tmp_path: Path) -> None:
    text = "5,000 captioned (1,003 more were done before), none failed, 213 images/s"
    assert outcome(plan(tmp_path, 1_000, 3), PERFECT) == text


def test_a_table_without_a_caption_does_not_look_like_success(tmp_path: Path) -> None:
    lines = list(closing_lines(plan(tmp_path), FAILED))
    assert lines[0] == "NO IMAGE WAS CAPTIONED: 1 failed (1 missing)"
    assert not any(line.startswith("table") or "gallery" in line for line in lines)


def test_a_run_that_only_failed_again_beside_captions_is_no_catastrophe(tmp_path: Path) -> None:
    assert outcome(plan(tmp_path, 10), FAILED).startswith("0 captioned (10 more were done before), 1 failed")


def test_nothing_left_to_do_says_so_and_counts_the_failures(tmp_path: Path) -> None:
    text = "nothing was left to do: 24 images were done already, and no part was changed"
    assert outcome(plan(tmp_path, 24), NOTHING) == text
    assert outcome(plan(tmp_path, 22, 2), NOTHING) == f"{text}; 2 of them failed"
    assert outcome(plan(tmp_path, 0, 24), NOTHING) == f"NO IMAGE WAS CAPTIONED: {text}; all of them failed"
    assert outcome(plan(tmp_path, 1), NOTHING).startswith("nothing was left to do: 1 image was done already")


def test_the_time_is_told_once(tmp_path: Path) -> None:
    text = "\n".join(closing_lines(plan(tmp_path), DONE))
    assert "took      23.5 s, the first captions after 12.2 s" in text
    assert text.count("took") == text.count("23.5") == 1
    assert "took" not in "\n".join(closing_lines(plan(tmp_path, 24), NOTHING))
    assert [duration(seconds) for seconds in (8.24, 185, 8_040)] == ["8.2 s", "3 min 5 s", "2 h 14 min"]


def test_the_prediction_stands_below_the_time(tmp_path: Path) -> None:
    lines = list(closing_lines(plan(tmp_path), DONE | {"predicted": {"seconds": 18.21}}))
    assert lines[2] == "planned   18.2 s, by jobs/plan.py"


def test_each_next_command_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "it's mine; rm -rf $HOME"
    commands = [line[10:] for line in closing_lines(plan(table), DONE) if "captioner " in line]
    assert [shlex.split(one) for one in commands] == [
        ["captioner", "query", str(table), "SELECT reason, image_id, detail FROM failures ORDER BY reason"],
        ["captioner", "gallery", str(table)],
        ["captioner", "query", str(table)],
        ["captioner", "verify", str(table)],
    ]
    monkeypatch.setattr(sys, "argv", ["/clone/jobs/caption.py"])
    assert f"next      python /clone/jobs/gallery.py {tmp_path}" in list(closing_lines(plan(tmp_path), DONE))


def test_failures_are_pointed_to_only_where_there_are_some(tmp_path: Path) -> None:
    def words(one: Any, summary: dict[str, Any]) -> set[str]:
        return {line.split(" ")[0] for line in closing_lines(one, summary)}

    assert "failures" in words(plan(tmp_path), DONE) & words(plan(tmp_path, 22, 2), NOTHING)
    assert "failures" not in words(plan(tmp_path), PERFECT)


def test_options_of_a_store_are_needed_again_and_not_shown(tmp_path: Path) -> None:
    text = "\n".join(closing_lines(plan(tmp_path, storage_options={"secret": "hunter2"}), DONE))
    assert "each with the same --storage-options" in text
    assert "hunter2" not in text


def test_the_demo_model_says_what_it_is_of_other_images(tmp_path: Path) -> None:
    job = SimpleNamespace(reads_demo_images=False, is_demo_model_elsewhere=True)
    assert f"beware    {DEMO_MODEL}. Give --model" in list(closing_lines(plan(tmp_path, job=job), DONE))


def test_after_the_demo_comes_a_job_of_ones_own(tmp_path: Path) -> None:
    job = SimpleNamespace(reads_demo_images=True, is_demo_model_elsewhere=False)
    assert list(closing_lines(plan(tmp_path, job=job), DONE))[-1] == (
        "          captioner caption IMAGES OUTPUT --model BUNDLE"
    )


def test_an_interrupted_run_says_what_is_saved_and_what_is_left(tmp_path: Path) -> None:
    cut = DONE | {"read": 314, "captioned": 312}
    text = "312 captioned, 2 failed (1 corrupt, 1 empty), all of them saved"
    assert interrupted_text(plan(tmp_path), cut) == f"{text}, 4,686 are left"
    assert interrupted_text(plan(tmp_path, num_left=None), cut) == text


def test_a_name_with_terminal_commands_is_shown_without_them(tmp_path: Path) -> None:
    shown = plan(tmp_path)
    shown.table.sample = lambda _: [{"image_id": "s3://b/\x1b]0;owned\x07a\nb.jpg", "caption": "a\x1b[2Jdog"}]
    [line] = [line for line in closing_lines(shown, DONE) if "owned" in line]
    assert line.isprintable()
    assert "dog" in line
