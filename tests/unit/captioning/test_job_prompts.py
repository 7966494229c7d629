"""`--prompts` of a job: what its plan says of them, and what it refuses before a worker starts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.captioning.job import output_location, resolve
from captioner.captioning.plan import plan_job
from captioner.config import CaptionJobConfig, DecodingConfig, InputConfig, ModelConfig, PlanConfig, ResourceConfig
from captioner.errors import ConfigError, InputError, OutputError, UsageError
from captioner.tables import CaptionTable
from tests.sample_images import encoded

FILE = """
caption: Describe the image.
tags: {text: "List. {?alt: The page says: {alt}.}", max_new_tokens: 9, max_value_tokens: 40}
is_photo: {text: "A photograph?", choice: [yes, no]}
"""


@pytest.fixture
def config(tmp_path: Path) -> CaptionJobConfig:
    image = [encoded(seed=seed) for seed in range(3)]
    columns = {"image": image, "alt": ["a dog", None, ""], "n": [1, 2, 3], "raw": image, "caption": ["x", "y", "z"]}
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    return CaptionJobConfig(
        input_path=str(tmp_path / "images.parquet"),
        output=str(tmp_path / "out"),
        input=InputConfig(image_column="image"),
        model=ModelConfig(model="demo"),
        prompts=write(tmp_path, FILE),
    )


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "prompts.yaml").write_text(text)
    return str(tmp_path / "prompts.yaml")


def test_a_plan_lists_each_prompt_with_its_tokens_and_decoding(config: CaptionJobConfig) -> None:
    plan = plan_job(replace(config, dry_run=True))
    lines = [line for line in plan.lines() if line.startswith("prompt")]
    assert lines[0].startswith("prompt    caption: ")
    assert lines[1].endswith(" tokens and the image; max_new_tokens 9; {alt}")
    assert "tags: at most" in lines[1]
    assert lines[2].endswith("tokens and the image; choice")


def test_columns_that_prompts_name_are_kept_under_the_name_that_was_given(config: CaptionJobConfig) -> None:
    asked = plan_job(replace(config, dry_run=True))
    assert [field.name for field in asked.frozen.columns.kept] == ["alt"]
    named = replace(config.input, keep_columns=("alt=text", "n"))
    renamed = plan_job(replace(config, input=named, dry_run=True))
    assert [field.name for field in renamed.frozen.columns.kept] == ["text", "n"]


def test_a_table_says_its_prompts_and_columns_and_one_without_prompts_says_neither(config: CaptionJobConfig) -> None:
    plan_job(config)
    table = CaptionTable(config.output)
    assert (table.identity() or {})["prompts"]["tags"]["text"] == "List. {?alt: The page says: {alt}.}"
    assert [field.name for field in table.answers()][:3] == ["caption_details", "is_photo", "is_photo_details"]
    without = resolve(replace(config, prompts=None))
    assert without.prompts == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE.replace("List.", "List all."), r"prompts.tags.text: List. .* there, List all. .* now"),
        (FILE.replace("is_photo", "photo"), r"prompts.is_photo.text: A photograph\? there, None now"),
        (FILE.replace("[yes, no]", "[no, yes]"), r"prompts.is_photo.constraint: .*yes.*no.* there, .*no.*yes.* now"),
        (FILE.replace("9", "8"), "prompts.tags.decoding.max_new_tokens: 9 there, 8 now"),
    ],
)
def test_other_prompts_are_refused_naming_both(
    config: CaptionJobConfig, tmp_path: Path, text: str, message: str
) -> None:
    plan_job(config)
    plan_job(config)
    with pytest.raises(OutputError, match=message):
        plan_job(replace(config, prompts=write(tmp_path, text)))


def test_the_same_prompts_in_another_order_continue_the_table(config: CaptionJobConfig, tmp_path: Path) -> None:
    first = plan_job(config)
    reordered = write(tmp_path, "\n".join(reversed(FILE.strip().splitlines())))
    then = plan_job(replace(config, prompts=reordered))
    assert [prompt.name for prompt in then.job.prompts] == [prompt.name for prompt in reversed(first.job.prompts)]
    assert then.answers == first.answers, "the columns of the table are the same"
    assert then.table.digest == first.table.digest


CASES: list[tuple[str, dict[str, Any], type[UsageError], str]] = [
    ("caption: x\nwidth: y", {}, ConfigError, "width is a column that every table has; expected another name"),
    ("caption: x\nwhy: y", {}, ConfigError, "why is a column that every table has"),
    ("caption: x\nselect: y", {}, ConfigError, "select is a word of SQL"),
    (
        "caption: {text: '{nothing}', max_value_tokens: 9}",
        {},
        InputError,
        r"--prompts nothing: .*images.parquet has no such column. .*Columns: image",
    ),
    (
        "caption: {text: '{caption}', max_value_tokens: 9}",
        {},
        ConfigError,
        "--prompts caption: caption is a column of the output; rename it, as",
    ),
    (
        "caption: x\nalt: {text: '{alt}', max_value_tokens: 9}",
        {},
        ConfigError,
        "--prompts alt: alt is a column of the answers; rename it, as",
    ),
    (
        "caption: x\nn: y",
        {"input": InputConfig(image_column="image", keep_columns=("alt=N",))},
        ConfigError,
        "--keep-columns alt: N is a column of the answers; rename it, as --keep-columns alt=input_n, or the prompt",
    ),
    (
        "caption: {text: '{raw}', max_value_tokens: 9}",
        {},
        InputError,
        "--prompts raw: raw of .* is binary; expected texts, numbers, or lists",
    ),
    (
        "caption: {text: '{a=b}', max_value_tokens: 9}",
        {},
        ConfigError,
        "--prompts names a column a=b; expected a name without =",
    ),
    (
        "caption: x\na: {text: y, choice: [b, c]}",
        {"decoding": DecodingConfig(num_beams=2)},
        ConfigError,
        "a: num_beams is 2; expected num_beams: 1 in a prompt with a constraint",
    ),
    (
        "caption: x\na: {text: y, json_schema: {type: thing}}",
        {},
        ConfigError,
        "the prompt a: .*thing.*; expected one that llguidance takes",
    ),
    ("caption: x\na: {text: y, regex: '(?<=a)b'}", {}, ConfigError, "the prompt a: .*; expected one that llguidance"),
    (
        f"caption: {'word ' * 300}",
        {},
        ConfigError,
        r"the prompt caption takes \d+ tokens, an image 1",
    ),
    ("caption: {text: x, system: y}", {}, ConfigError, "caption: system is given, but the model is a bundle"),
    (
        "caption: x\na: {text: y, do_sample: true, num_captions: 4}",
        {"resources": ResourceConfig(slots="4")},
        ConfigError,
        "--slots is 4; expected at least 5, the captions and beams of all prompts",
    ),
]


@pytest.mark.parametrize(("text", "changes", "kind", "message"), CASES, ids=[case[3][:40] for case in CASES])
def test_what_cannot_be_asked_is_refused_before_a_worker_starts(
    config: CaptionJobConfig, tmp_path: Path, text: str, changes: dict[str, Any], kind: type[UsageError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        plan_job(replace(config, prompts=write(tmp_path, text), **changes))
    assert CaptionTable(config.output).identity() is None


def test_a_column_that_the_table_has_is_asked_for_under_another_name(config: CaptionJobConfig, tmp_path: Path) -> None:
    renamed = InputConfig(image_column="image", keep_columns=("caption=input_caption",))
    plan = plan_job(
        replace(
            config, prompts=write(tmp_path, "caption: {text: 'It says {caption}.', max_value_tokens: 9}"), input=renamed
        )
    )
    assert plan.frozen.columns.kept_from == ("caption",)


def test_images_that_have_no_columns_are_refused_for_a_prompt_with_one(
    config: CaptionJobConfig, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(encoded())
    folder = replace(config, input_path=str(tmp_path / "images"), input=InputConfig())
    message = r"--prompts with {alt}: .* is image files, which have no columns; expected prompts without columns"
    with pytest.raises(ConfigError, match=message):
        plan_job(folder)


def test_prompts_beside_a_prompt_or_for_a_model_alone_are_refused(config: CaptionJobConfig) -> None:
    with pytest.raises(ConfigError, match=r"--prompt is 'x'; expected none beside --prompts .*, which has caption"):
        resolve(replace(config, model=ModelConfig(model="demo", prompt="x")))
    with pytest.raises(ConfigError, match=r"--prompts is a\.yaml; expected an INPUT with it"):
        PlanConfig(model=ModelConfig(model="a/b"), prompts="a.yaml")


def test_a_worker_elsewhere_finds_the_table_without_the_file_of_prompts(config: CaptionJobConfig) -> None:
    job = resolve(config)
    Path(str(config.prompts)).unlink()
    assert str(output_location(job.config)) == config.output


def test_an_identity_is_json(config: CaptionJobConfig) -> None:
    plan = plan_job(replace(config, dry_run=True))
    identity = plan.job.identity(plan.model)
    assert json.loads(json.dumps(identity)) == identity
