"""The demo captioner learns another order of words from 200 captions by LoRA, through the real commands."""

from pathlib import Path

import pytest

from captioner.demo import scenes
from tests.e2e.test_refit import NUM_HELD_OUT, captions_of_job, run, share_right
from tests.style_scenes import read_styled, write_styled

pytestmark = pytest.mark.slow

LORA = ["--model", "demo", "--lora-rank", "16", "--lora-learning-rate", "0.001"]
STEPS = ["--batch-size", "20", "--max-steps", "300", "--eval-every", "300", "--num-scored-images", "0"]
ONE_THREAD = ["--workers", "2"]


def test_200_captions_teach_an_order_of_words_and_cost_no_content(tmp_path: Path) -> None:
    scenes.write_folder(tmp_path / "held-out", "test", NUM_HELD_OUT)
    before = captions_of_job(tmp_path, "demo", "before")
    write_styled(tmp_path / "labels", {"train": 200, "validation": 20})
    assert (
        run("fit_projector.py", "labels/labels.jsonl", "styled", *LORA, *STEPS, *ONE_THREAD, cwd=tmp_path)["steps"]
        == 300
    )
    after = captions_of_job(tmp_path, "./styled", "after")

    held_out = list(scenes.examples("test", NUM_HELD_OUT))
    found = [read_styled(after[example.image_id]) for example in held_out]
    in_style = sum(scene is not None for scene in found) / NUM_HELD_OUT
    right = sum(scene == example.scene for scene, example in zip(found, held_out, strict=True)) / NUM_HELD_OUT
    print(f"in style {in_style:.3f}, right {right:.3f}, before {share_right(before):.3f}")
    assert not any(map(read_styled, before.values()))
    assert in_style >= 0.9
    assert right >= share_right(before) - 0.03
