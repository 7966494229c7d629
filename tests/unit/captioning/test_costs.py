"""Measured costs are kept beside the table, and are those of one model, device and decoding."""

from pathlib import Path
from typing import Any

import pytest

from captioner.captioning.costs import load_costs, save_costs, settings_digest
from captioner.config import CaptionJobConfig, DecodingConfig, ImageConfig, ResourceConfig, ScoringConfig
from captioner.prompts import Prompt, PromptText, WeightedText
from captioner.storage import open_store
from tests.unit.captioning.sample_costs import COSTS

PROMPT = Prompt(name="a", texts=(WeightedText(PromptText.parse("x", "a")),), decoding=DecodingConfig())


def test_costs_are_kept_beside_the_table_and_found_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), {})
    assert load_costs(store, str(tmp_path)) is None
    save_costs(COSTS, store, str(tmp_path))
    assert load_costs(store, str(tmp_path)) == COSTS


@pytest.mark.parametrize("text", ["{}", '{"device": "cu', "[1]", "\xff", '{"more": 1}', '"encode_s": "much"'])
def test_costs_that_cannot_be_read_are_none_and_said_in_a_line(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path), {})
    save_costs(COSTS, store, str(tmp_path))
    file = tmp_path / "_run" / "plan.json"
    whole = file.read_text()
    field = text.partition(":")[0]
    is_field = field == '"encode_s"'
    file.write_text(whole.replace('"encode_s": 0.004', text) if is_field else text, encoding="latin-1")
    with caplog.at_level("INFO"):
        assert load_costs(store, str(tmp_path)) is None
    assert [line.startswith("plan_json=ignored reason=") for line in caplog.messages] == [True]


@pytest.mark.parametrize(
    "other",
    [
        {"decoding": DecodingConfig(num_beams=4)},
        {"decoding": DecodingConfig(max_new_tokens=7)},
        {"image": ImageConfig(fast_decode=True)},
        {"scoring": ScoringConfig(clip_score=True)},
        {"resources": ResourceConfig(slots="7")},
    ],
)
def test_what_an_image_costs_goes_by_decoding_scoring_image_and_slots(other: dict[str, Any]) -> None:
    assert settings_digest(CaptionJobConfig(output="a", **other)) != COSTS.settings
    assert settings_digest(CaptionJobConfig(output="a"), [PROMPT]) != COSTS.settings
    assert settings_digest(CaptionJobConfig(output="b", resources=ResourceConfig(workers="3"))) == COSTS.settings
