"""Prompts that are added to a table: each answer is the one of a table that had all prompts from the start."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from captioner.captioning.closing import outcome
from captioner.captioning.plan import Plan, plan_job
from captioner.config import (
    CaptionJobConfig,
    DecodingConfig,
    EvaluateConfig,
    ExportConfig,
    GalleryConfig,
    InputConfig,
    LabelsConfig,
    ModelConfig,
    ScoringConfig,
    VerifyConfig,
)
from captioner.errors import ConfigError, InputError, OutputError
from captioner.evaluation import evaluate
from captioner.export import export_table
from captioner.gallery.gallery_job import gallery
from captioner.query import read_rows
from captioner.storage import Location
from captioner.tables import CaptionTable, PartSummary, Stamp
from captioner.tables.verification import verify
from captioner.training.labels import read_labels
from tests.bundles import save_tiny_bundle
from tests.conftest import Bucket
from tests.job_in_process import run_job
from tests.sample_images import encoded
from tests.unit.model.tiny_models import save_llava

NUM = 6
FOUR = {
    "caption": "w1",
    "tags": "{text: w2 w3, max_new_tokens: 4}",
    "drawn": "{texts: [w4, {text: w5, weight: 2}], do_sample: true, num_captions: 2}",
    "is_photo": "{text: w6, choice: [yes, no], max_new_tokens: 4}",
}
FIFTH = {
    "long": "{texts: [w7, w8 w2], do_sample: true, temperature: 2.0, redraw_repetitive: 2, trim_to_sentence: true}"
}
SIXTH = {
    "scene": "{text: w9, max_new_tokens: 20, json_schema: {type: object, additionalProperties: false, required: [n],"
    " properties: {n: {type: integer, minimum: 0, maximum: 9}}}}"
}
ALL = FOUR | FIFTH | SIXTH


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


class Jobs:
    """Jobs over one folder of images into one table, and into one that has all prompts at once."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.images = folder, folder / "images"
        self.images.mkdir()
        for seed in range(NUM):
            self.image(seed).write_bytes(encoded(seed=seed))
        (self.images / "broken.jpg").write_bytes(b"no image")
        self.config = CaptionJobConfig(
            input_path=str(self.images),
            output=str(folder / "table"),
            model=ModelConfig(model=model, device="cpu"),
            decoding=DecodingConfig(max_new_tokens=8),
        )
        self.num_runs = 0

    @property
    def table(self) -> CaptionTable:
        return CaptionTable(self.config.output)

    def image(self, seed: int) -> Path:
        return self.images / f"{seed}.jpg"

    def asked(self, prompts: dict[str, str], **changes: Any) -> CaptionJobConfig:
        file = self.folder / "prompts.yaml"
        file.write_text("\n".join(f"{name}: {said}" for name, said in prompts.items()))
        return replace(self.config, prompts=str(file), **changes)

    def plan(self, prompts: dict[str, str], **changes: Any) -> Plan:
        return plan_job(self.asked(prompts, **changes, dry_run=True))

    def run(self, prompts: dict[str, str], num_rows: int | None = None, **changes: Any) -> PartSummary:
        self.num_runs += 1
        return run_job(self.asked(prompts, **changes), f"run-{self.num_runs}", num_rows=num_rows)

    def rows(self, sql: str, output: str | None = None) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = read_rows(CaptionTable(output or self.config.output), sql).to_pylist()
        return found

    def column(self, sql: str) -> list[Any]:
        return [next(iter(row.values())) for row in self.rows(sql)]

    def verified(self, **flags: Any) -> dict[str, Any]:
        return dict(verify(VerifyConfig(table=self.config.output, **flags)))

    def bytes_of(self, folder: str) -> dict[str, bytes]:
        root = Path(self.config.output)
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted((root / folder).rglob("*.parquet"))}

    def assert_as_if_at_once(self, prompts: dict[str, str]) -> None:
        """The table is the one that has these prompts from the start, but for its runs."""
        at_once = str(self.folder / "at-once")
        self.run(prompts, output=at_once)
        sql = "SELECT * EXCLUDE run_id FROM captions ORDER BY key"
        found, wanted = (read_rows(CaptionTable(output), sql) for output in (self.config.output, at_once))
        assert found.schema.names == wanted.schema.names
        assert [_rounded(row) for row in found.to_pylist()] == [_rounded(row) for row in wanted.to_pylist()]


def _rounded(value: Any) -> Any:
    """Logits of a caption differ in their last bits with what is decoded beside it."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


@pytest.fixture
def jobs(tmp_path: Path, model: str) -> Jobs:
    return Jobs(tmp_path, model)


def test_a_fifth_prompt_and_then_a_sixth_end_with_the_table_of_all_six_at_once(jobs: Jobs) -> None:
    jobs.run(FOUR)
    before = jobs.bytes_of(".")
    fifth = jobs.run(FOUR | FIFTH)
    assert (fifth.captioned, list(fifth.answers)) == (NUM, ["long"])
    assert jobs.run(ALL).captioned == NUM
    assert before.items() <= jobs.bytes_of(".").items(), "no earlier part is written again"
    assert jobs.run(ALL).captioned == 0
    jobs.assert_as_if_at_once(ALL)
    found = jobs.verified()
    assert (found["ok"], found["captioned"], found["failed"]) == (True, NUM, 1)
    assert {name: (one["ok"], one["answered"], one["failed"]) for name, one in found["columns"].items()} == {
        "long": (True, NUM, 0),
        "scene": (True, NUM, 0),
    }


def test_two_prompts_may_be_added_at_once_and_only_those_are_loaded(jobs: Jobs) -> None:
    jobs.run(FOUR)
    plan = jobs.plan(ALL)
    assert [prompt.name for prompt in plan.prompts] == ["long", "scene"]
    assert "asked     long, scene alone: these images have all else" in list(plan.lines())
    jobs.run(ALL)
    jobs.assert_as_if_at_once(ALL)


def test_a_kill_in_the_middle_of_an_added_column_is_continued(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.run(FOUR)
    jobs.run(FOUR | FIFTH, num_rows=2)
    assert jobs.column("SELECT count(long) FROM captions") == [2]
    found = jobs.verified()
    assert (found["ok"], found["missing"], found["columns"]["long"]["missing"]) == (False, 0, NUM - 2)
    lines = capsys.readouterr().err.splitlines()
    assert "read 7 = captioned 6 + failed 1" in lines
    assert "long: captioned 6 != answered 2 + failed 0" in lines
    assert lines[-1] == "  next: the command of the caption job again, which captions what is missing"
    jobs.run(ALL, num_rows=3)
    assert jobs.verified()["columns"]["scene"]["missing"] == NUM - 3
    jobs.run(ALL)
    jobs.assert_as_if_at_once(ALL)
    assert jobs.verified()["ok"]


def test_a_prompt_may_be_added_before_all_images_are_captioned(jobs: Jobs) -> None:
    jobs.run(FOUR, num_rows=2)
    plan = jobs.plan(ALL)
    assert len(plan.prompts) == 6
    assert plan.added_alone == ()
    last = jobs.run(ALL, num_rows=4)
    assert last.captioned == 4
    jobs.run(ALL)
    jobs.assert_as_if_at_once(ALL)
    assert jobs.verified()["ok"]


def test_an_image_that_gets_its_caption_later_gets_the_added_answer_with_it(jobs: Jobs) -> None:
    data = jobs.image(1).read_bytes()
    jobs.image(1).write_bytes(b"")
    jobs.run(FOUR)
    jobs.run(FOUR | FIFTH)
    found = jobs.verified()
    assert (found["ok"], found["failed"], found["columns"]["long"]["answered"]) == (True, 2, NUM - 1)
    assert jobs.rows("FROM unanswered") == [], "an added prompt is asked of images that have a caption"
    jobs.image(1).write_bytes(data)
    jobs.run(FOUR | FIFTH, retry_failures="all")
    jobs.assert_as_if_at_once(FOUR | FIFTH)
    assert jobs.verified()["ok"]


def test_an_image_that_is_gone_when_a_prompt_is_added_keeps_its_caption_and_may_be_tried_again(jobs: Jobs) -> None:
    jobs.run(FOUR)
    data = jobs.image(2).read_bytes()
    jobs.image(2).unlink()
    last = jobs.run(FOUR | FIFTH)
    assert (last.captioned, last.failed_by_reason) == (NUM - 1, {"missing": 1})
    [failed] = jobs.rows("SELECT image_id, prompt, reason, attempt, run_id FROM unanswered")
    assert failed == {
        "image_id": str(jobs.image(2)),
        "prompt": "long",
        "reason": "missing",
        "attempt": 1,
        "run_id": "run-2",
    }
    assert jobs.column("SELECT long IS NULL FROM captions WHERE image_id LIKE '%2.jpg'") == [True]
    assert jobs.column("SELECT reason FROM failures") == ["not_an_image"], "an image with a caption is no failure"
    found = jobs.verified()
    assert (found["ok"], found["columns"]["long"]["failed_by_reason"]) == (True, {"missing": 1})
    assert jobs.run(FOUR | FIFTH).captioned == 0, "a missing image is no transient failure"
    jobs.image(2).write_bytes(data)
    assert jobs.run(FOUR | FIFTH, retry_failures="missing").captioned == 1
    assert jobs.rows("FROM unanswered") == []
    jobs.assert_as_if_at_once(FOUR | FIFTH)


def test_prompts_may_be_named_as_what_the_views_are_made_of(jobs: Jobs) -> None:
    jobs.run(FOUR)
    data = jobs.image(2).read_bytes()
    jobs.image(2).unlink()
    asked = FOUR | dict.fromkeys(("captions", "scene", "failures_scene", "begun", "unanswered"), FIFTH["long"])
    jobs.run(asked)
    unanswered = jobs.column("SELECT prompt FROM unanswered ORDER BY prompt")
    assert unanswered == ["begun", "captions", "failures_scene", "scene", "unanswered"]
    jobs.image(2).write_bytes(data)
    jobs.run(asked, retry_failures="missing")
    jobs.assert_as_if_at_once(asked)


def test_attempts_at_an_answer_are_counted_apart_from_those_at_a_caption(jobs: Jobs) -> None:
    jobs.run(FOUR)
    jobs.image(0).unlink()
    for _ in range(2):
        jobs.run(FOUR | FIFTH, retry_failures="all")
    assert jobs.column("SELECT attempt FROM attempts ORDER BY ALL") == [1, 2, 3]
    assert jobs.column("SELECT attempt FROM unanswered") == [2]


def test_an_image_that_fails_for_two_prompts_counts_once_against_the_limit_of_failures(jobs: Jobs) -> None:
    jobs.run(FOUR)
    jobs.image(0).unlink()
    jobs.run(ALL)
    folders = [family.failures for family in jobs.table.families()]
    assert jobs.table.num_written("run-2", folders) == 2
    assert jobs.table.failed_by_reason("run-2", folders) == {"missing": 1}


def test_images_that_a_refresh_adds_are_asked_everything(jobs: Jobs) -> None:
    jobs.run(FOUR)
    jobs.run(FOUR | FIFTH)
    (jobs.images / "later.jpg").write_bytes(encoded(seed=99))
    assert jobs.run(FOUR | FIFTH, refresh=True).captioned == 1
    assert jobs.column("SELECT count(long) FROM captions") == [NUM + 1]
    assert jobs.verified()["ok"]


def test_a_repair_puts_a_torn_column_aside_and_the_next_run_answers_again(jobs: Jobs) -> None:
    jobs.run(FOUR)
    jobs.run(ALL)
    [part] = jobs.bytes_of("columns/long/answers")
    Path(jobs.config.output, part).write_bytes(b"PAR1 half a file")
    with pytest.raises(OutputError, match="cannot be read"):
        jobs.run(ALL)
    assert jobs.verified(repair=True)["columns"]["long"]["missing"] == NUM
    jobs.run(ALL)
    jobs.assert_as_if_at_once(ALL)


def test_captions_that_a_repair_put_aside_are_made_again_beside_the_answers_that_are_there(jobs: Jobs) -> None:
    jobs.run(FOUR)
    jobs.run(ALL)
    [part] = jobs.bytes_of("captions")
    Path(jobs.config.output, part).write_bytes(b"PAR1 half a file")
    found = jobs.verified(repair=True)
    assert (found["missing"], found["columns"]["long"]) == (
        NUM,
        found["columns"]["long"] | {"answered": 0, "missing": 0, "alien": 0},
    )
    assert [prompt.name for prompt in jobs.plan(ALL).prompts] == list(FOUR)
    jobs.run(ALL)
    jobs.assert_as_if_at_once(ALL)
    assert jobs.verified()["ok"]


def test_duplicates_in_a_column_are_found_and_dropped(jobs: Jobs) -> None:
    jobs.run(FOUR)
    jobs.run(ALL)
    table = jobs.table
    family = table.families()[1]
    [part] = table.parts(family.rows)
    rows = pq.read_table(part).slice(1, 2).replace_schema_metadata()
    table.write_part(family.rows, rows, Stamp("run-1", family.digest))
    found = jobs.verified()
    assert (found["ok"], found["duplicated"], found["columns"]["long"]["duplicated"]) == (False, 0, 2)
    assert jobs.verified(repair=True)["ok"]
    jobs.assert_as_if_at_once(ALL)


def test_a_compaction_compacts_each_column_apart(jobs: Jobs) -> None:
    jobs.run(FOUR)
    for num_rows in (2, 2, None):
        jobs.run(ALL, num_rows=num_rows)
    before = jobs.rows("SELECT * EXCLUDE run_id FROM captions ORDER BY key")
    found = jobs.verified(compact=True)
    assert (found["ok"], found["parts"]["columns/long/answers"]) == (True, 1)
    assert jobs.rows("SELECT * EXCLUDE run_id FROM captions ORDER BY key") == before


def test_a_part_of_another_column_is_foreign_and_what_no_run_writes_is_found(jobs: Jobs) -> None:
    jobs.run(FOUR)
    jobs.run(ALL)
    [part] = jobs.bytes_of("columns/long/answers")
    scene = Path(jobs.config.output, "columns/scene/answers")
    (scene / Path(part).name).write_bytes(Path(jobs.config.output, part).read_bytes())
    (scene.parent / "notes.txt").write_text("x")
    (scene.parent.parent / "width").mkdir()
    found = jobs.verified()
    assert found["foreign_parts"] == [str(scene / Path(part).name)]
    assert [Path(name).name for name in found["strangers"]] == ["width", "notes.txt"]


REFUSED: list[tuple[dict[str, str], str]] = [
    (ALL | {"long": "other"}, r"prompts.long.text: None there, other now"),
    (ALL | {"scene": SIXTH["scene"].replace("w9", "w1")}, r"prompts.scene.text: w9 there, w1 now"),
    (ALL | {"tags": "{text: w3, max_new_tokens: 4}"}, r"prompts.tags.text: w2 w3 there, w3 now"),
    (ALL | {"tags": "{text: w2 w3, max_new_tokens: 5}"}, r"prompts.tags.decoding.max_new_tokens: 4 there, 5 now"),
    (FOUR | SIXTH, r"prompts.long.decoding.do_sample: True there, None now"),
    ({name: said for name, said in ALL.items() if name != "tags"}, r"prompts.tags.text: w2 w3 there, None now"),
]


@pytest.mark.parametrize(("prompts", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_another_text_under_an_earlier_name_and_a_prompt_less_are_refused_naming_both(
    jobs: Jobs, prompts: dict[str, str], message: str
) -> None:
    plan_job(jobs.asked(FOUR))
    plan_job(jobs.asked(ALL))
    with pytest.raises(OutputError, match=message):
        jobs.plan(prompts)


def test_the_order_of_added_prompts_is_free(jobs: Jobs) -> None:
    plan_job(jobs.asked(FOUR))
    first = plan_job(jobs.asked(ALL))
    then = plan_job(jobs.asked(dict(reversed(ALL.items()))))
    assert then.families == first.families
    assert then.table.digest == first.table.digest


TAGS = {"tags": FOUR["tags"], "is_photo": FOUR["is_photo"]}


def test_captions_without_named_prompts_get_columns_beside_them(jobs: Jobs, tmp_path: Path) -> None:
    jobs.config = replace(jobs.config, decoding=replace(jobs.config.decoding, redraw_repetitive=1))
    plain, named = str(tmp_path / "plain"), str(tmp_path / "named")
    run_job(replace(jobs.config, output=plain), "run-plain")
    run_job(jobs.config, "run-begun", num_rows=3)  # killed
    begun = jobs.bytes_of("captions")
    assert [prompt.name for prompt in jobs.plan({"tags": FOUR["tags"]}).prompts] == ["caption", "tags"]
    assert set(jobs.run({"tags": FOUR["tags"]}, num_rows=5).answers) == {"caption", "tags"}  # killed, too
    jobs.run({"tags": FOUR["tags"]})
    jobs.run(TAGS)
    assert begun.items() <= jobs.bytes_of("captions").items()
    sql = "SELECT image_id, caption, candidates, caption_details FROM captions ORDER BY key"
    assert [_rounded(row) for row in jobs.rows(sql)] == [_rounded(row) for row in jobs.rows(sql, plain)]
    jobs.run({"caption": "w1", **TAGS}, output=named)
    sql = "SELECT tags, tags_details, is_photo FROM captions ORDER BY key"
    assert [_rounded(row) for row in jobs.rows(sql)] == [_rounded(row) for row in jobs.rows(sql, named)]
    assert [field.name for field in jobs.table.answers()][:3] == ["caption_details", "is_photo", "is_photo_details"]
    found = jobs.verified()
    assert (found["ok"], found["columns"]["tags"]["answered"]) == (True, NUM)
    for config in (jobs.asked({"tags": FOUR["tags"]}), jobs.config):
        with pytest.raises(OutputError, match=r"prompts.is_photo.text: w6 there, None now"):
            plan_job(config)


def test_prompts_without_caption_begin_a_table_whose_captions_answer_the_prompt_of_the_model(
    jobs: Jobs, tmp_path: Path
) -> None:
    model = ModelConfig(model=str(save_llava(tmp_path / "llava")), prompt="{{a}} {image} {b}?", device="cpu")
    jobs.config = replace(jobs.config, model=model)
    plain = str(tmp_path / "plain")
    run_job(replace(jobs.config, output=plain), "run-plain")
    jobs.run(TAGS)
    sql = "SELECT caption, num_tokens FROM captions ORDER BY key"
    assert jobs.rows(sql) == jobs.rows(sql, plain)
    assert [family.prompt for family in jobs.table.families()] == ["caption", "is_photo", "tags"]
    with pytest.raises(OutputError, match=r"model.fingerprint"):
        jobs.plan(TAGS, model=replace(model, prompt="Else?"))


def test_a_prompt_for_captions_that_answer_no_named_one_is_refused_naming_the_remedy(jobs: Jobs) -> None:
    run_job(jobs.config, "run-plain")
    with pytest.raises(OutputError, match=r"has caption: w1; expected prompts without it: a .* Name it caption_2"):
        jobs.plan(FOUR)
    assert [prompt.name for prompt in jobs.plan({"caption_2": FOUR["caption"]}).prompts] == ["caption_2"]
    with pytest.raises(
        ConfigError, match=r"--prompt is 'w1'; .* which has caption: .* Leave out --prompt, or caption in"
    ):
        jobs.plan(FOUR, model=replace(jobs.config.model, prompt="w1"))


def test_an_added_prompt_may_name_only_columns_that_the_table_keeps(jobs: Jobs, tmp_path: Path) -> None:
    columns = {"image": [encoded(seed=seed) for seed in range(3)], "alt": ["w3", None, "w4"], "n": [1, 2, 3]}
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    jobs.config = replace(
        jobs.config, input_path=str(tmp_path / "images.parquet"), input=InputConfig(keep_columns=("alt=text",))
    )
    jobs.run({"caption": "w1"})
    with pytest.raises(ConfigError, match=r"--prompts names the column n, which .*table does not keep.*\(alt\)"):
        jobs.plan({"caption": "w1", "told": '"w2 {n}"'})
    assert jobs.table.families()[1:] == []
    prompts = {"caption": "w1", "told": '"w2 {alt}"'}
    jobs.run(prompts)
    jobs.assert_as_if_at_once(prompts)


def test_a_tar_that_was_never_counted_is_asked_what_each_of_its_samples_lacks(jobs: Jobs, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for path in sorted(jobs.images.iterdir()):
            tar.add(path, path.name)
    jobs.config = replace(jobs.config, input_path=str(tmp_path / "images.tar"))
    jobs.run(FOUR, num_rows=3)
    counts = Path(jobs.config.output, "_run", "counts")
    for count in counts.iterdir():
        count.unlink()
    plan = jobs.plan(ALL)
    assert [(piece.stop, len(piece.held["long"]), piece.held["caption"].sum()) for piece in plan.slices] == [
        (None, 3, 3)
    ]
    jobs.run(ALL)
    jobs.assert_as_if_at_once(ALL)
    assert jobs.verified()["ok"]


def test_prompts_name_members_of_a_tar_and_keys_of_its_json_as_they_name_columns(jobs: Jobs, tmp_path: Path) -> None:
    alts, notes = ["w3 {w4}", None, "</s> w5", "w6"], ["w7 w8", "w9", None, "w2"]
    images = [encoded(seed=seed) for seed in range(4)]
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for number, (image, alt, note) in enumerate(zip(images, alts, notes, strict=True)):
            members = {"jpg": image, "json": json.dumps({"alt": alt, "n": number}).encode()}
            for ending, data in members.items() if note is None else [*members.items(), ("txt", f"{note}\n".encode())]:
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    columns = {"image": images, "alt": alts, "txt": notes, "n": [0, 1, 2, 3]}
    pq.write_table(pa.table(columns), tmp_path / "images.parquet")
    begun = {
        "caption": '{text: "w1 {?alt: w2 {alt}} {n}", max_value_tokens: 20}',
        "told": '{text: "{n} {txt}", max_value_tokens: 20}',
    }
    later = begun | {"mood": '{text: "w5 {?txt: w3 {txt}} {alt}", max_value_tokens: 20}'}
    for kind in ("tar", "parquet"):
        output = str(tmp_path / kind)
        for prompts in (begun, later):
            jobs.run(prompts, input_path=str(tmp_path / f"images.{kind}"), output=output)
    sql = "SELECT key, caption, told, mood, mood_details.num_cut_values FROM captions ORDER BY key"
    assert jobs.rows(sql, str(tmp_path / "tar")) == jobs.rows(sql, str(tmp_path / "parquet"))
    assert len({row["mood"] for row in jobs.rows(sql, str(tmp_path / "tar"))}) > 1
    asked = {"caption": '{text: "w1 {alt} {atl}", max_value_tokens: 20}'}
    plan = jobs.plan(asked, input_path=str(tmp_path / "images.tar"), output=str(tmp_path / "new"))
    told = [line for line in plan.lines() if line.startswith("beware")]
    assert told == ["beware    {atl} has no value in the first 16 samples of images.tar: is it called so?"]


def test_parts_of_a_column_whose_prompt_is_not_known_are_refused(jobs: Jobs) -> None:
    jobs.run(FOUR)
    jobs.run(FOUR | FIFTH)
    Path(jobs.config.output, "columns/long/prompt.json").unlink()
    with pytest.raises(OutputError, match=r"holds 1 parts but no columns/long/prompt.json"):
        jobs.run(FOUR | FIFTH)


def test_pages_and_exports_have_the_added_columns(jobs: Jobs, tmp_path: Path) -> None:
    jobs.run(FOUR)
    jobs.run(ALL, num_rows=3)
    page = tmp_path / "page.html"
    gallery(GalleryConfig(table=jobs.config.output, output=str(page), sample=NUM + 1))
    text = page.read_text().replace('": "', '":"')
    assert text.count('"label":"long"') == text.count('"label":"scene"') == 3
    export = ExportConfig(table=jobs.config.output, output=str(tmp_path / "out"), columns=("image_id", "long", "scene"))
    export_table(export)
    lines = (tmp_path / "out" / "captions-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["long"] is None for line in lines].count(True) == NUM - 3


def test_evaluations_and_fits_read_an_added_column_and_select_by_it(jobs: Jobs, tmp_path: Path) -> None:
    jobs.run({"caption": "w1"})
    jobs.run({"caption": "w1", "long": "{text: w7 w2, max_new_tokens: 4}"}, num_rows=4)
    found = jobs.rows("SELECT image_id, caption, long FROM captions WHERE long IS NOT NULL ORDER BY key")
    where = f"long = '{found[0]['long']}'"
    is_chosen = [row["long"] == found[0]["long"] for row in found]

    def of_file(texts: list[str]) -> dict[str, Any]:
        rows = [{"image_id": row["image_id"], "caption": text} for row, text in zip(found, texts, strict=True) if text]
        (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return dict(evaluate(EvaluateConfig(captions=str(tmp_path / "texts.jsonl"), references=jobs.config.output)))

    of_column = EvaluateConfig(captions=jobs.config.output, references=jobs.config.output, caption_column="long")
    assert evaluate(of_column) == of_file([row["long"] for row in found])  # an image without an answer has no text
    of_rows = replace(of_column, caption_column="", where=where)
    assert evaluate(of_rows) == of_file(
        [chosen and row["caption"] for row, chosen in zip(found, is_chosen, strict=True)]
    )
    swapped = evaluate(replace(of_column, caption_column="", reference_column="long"))
    assert swapped["reference_images"] == len(found)
    labels = LabelsConfig(labels_path=jobs.config.output, caption_column="long", where=where)
    told = [caption for captions in read_labels(labels, "").table["captions"].to_pylist() for caption in captions]
    assert told == [found[0]["long"]] * sum(is_chosen)


def test_an_evaluation_refuses_a_column_that_is_not_there_and_a_condition_on_what_is_no_table(jobs: Jobs) -> None:
    jobs.run({"caption": "w1"})
    config = EvaluateConfig(captions=jobs.config.output, references="demo", caption_column="long")
    with pytest.raises(InputError, match=r"has no column long of texts, for --caption-column; it has image_id, cap"):
        evaluate(config)
    with pytest.raises(ConfigError, match=r'--where is long = 1: .*"long" not found'):
        evaluate(replace(config, caption_column="", where="long = 1"))
    parts = replace(config, captions=f"{jobs.config.output}/captions", caption_column="", where="key = 1")
    with pytest.raises(ConfigError, match=r"captions is no caption table; expected the OUTPUT of a .*: .*table, or no"):
        evaluate(parts)
    with pytest.raises(ConfigError, match="--reference-column is long; expected none with `demo`"):
        replace(config, reference_column="long")


def test_an_export_of_all_columns_goes_elsewhere_once_the_table_has_one_more(jobs: Jobs, tmp_path: Path) -> None:
    export = ExportConfig(table=jobs.config.output, output=str(tmp_path / "out"))
    some = replace(export, output=str(tmp_path / "some"), columns=("image_id", "caption"))
    jobs.run(FOUR)
    for config in (export, some):
        export_table(config)
    jobs.run(FOUR | FIFTH)
    assert export_table(some)["rows"] == 0
    with pytest.raises(OutputError, match=r"added_columns: None there, \['long'\] now"):
        export_table(export)
    assert export_table(replace(export, output=str(tmp_path / "new")))["rows"] == NUM


def test_iceberg_has_an_added_column_as_a_table_beside_that_of_the_captions(
    jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogs = pytest.importorskip("pyiceberg.catalog")
    out = tmp_path / "out"
    export = ExportConfig(table=jobs.config.output, output=str(out), format="iceberg")
    jobs.run({"caption": "w1"})
    assert export_table(export)["rows"] == NUM
    later = {"caption": "w1", "tags": "w2", "mood": "w3"}
    jobs.run(later, num_rows=4)
    assert export_table(export)["rows"] == 0
    told = capsys.readouterr().err.splitlines()[-2:]
    assert told == [f"4 answers in captioner.captions_{name}, by key" for name in ("mood", "tags")]
    jobs.run(later)
    assert export_table(export)["exports"] == [4, 5]
    assert export_table(export)["exports"] == []
    catalog = catalogs.load_catalog("captioner", type="sql", uri=f"sqlite:///{out}/catalog.db")
    rows = catalog.load_table("captioner.captions_tags").scan().to_arrow().sort_by("key")
    assert rows["tags"].to_pylist() == jobs.column("SELECT tags FROM captions ORDER BY key")
    assert rows["key"].to_pylist() == jobs.column("SELECT key FROM captions ORDER BY key")


def test_a_table_on_s3_gets_its_columns_as_a_local_one(jobs: Jobs, s3: Bucket) -> None:
    options = s3.storage_options
    jobs.config = replace(jobs.config, output=f"{s3.url}/table", input=InputConfig(output_storage_options=options))
    prompts = {name: FOUR[name] for name in ("caption", "tags")}
    table = CaptionTable(Location(f"{s3.url}/table", options))
    jobs.run({"caption": FOUR["caption"]})
    for num_rows in (2, None):
        jobs.run(prompts, num_rows=num_rows)
    [_, family] = table.families()
    assert (family.prompt, len(table.parts(family.rows))) == ("tags", 2)
    rows = read_rows(table, "SELECT key, tags FROM captions ORDER BY key")
    assert None not in rows["tags"].to_pylist()
    flags = {"table": f"{s3.url}/table", "storage_options": options}
    found = verify(VerifyConfig(**flags, compact=True))
    assert (found["ok"], found["columns"]["tags"]["answered"], found["parts"][family.rows]) == (True, NUM, 1)
    assert read_rows(table, "SELECT key, tags FROM captions ORDER BY key").equals(rows)
    with pytest.raises(OutputError, match=r"prompts.tags.text: w2 w3 there, w3 now"):
        jobs.plan(prompts | {"tags": "{text: w3, max_new_tokens: 4}"})


def test_the_end_of_a_run_says_which_prompt_it_asked(jobs: Jobs) -> None:
    jobs.run(FOUR)
    plan = jobs.plan(FOUR | FIFTH)
    done = {"read": 6, "captioned": 6, "failed": 0, "failed_by_reason": {}, "images_per_s": 2.0}
    assert outcome(plan, done) == "6 captioned by long alone (1 more were done before), none failed, 2 images/s"


def test_clip_scores_stay_those_of_the_captions(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, "demo")
    jobs.config = replace(jobs.config, scoring=ScoringConfig(clip_score=True))
    jobs.run({"caption": "w1"}, num_rows=2)
    jobs.run({"caption": "w1", "tags": "w2"})
    jobs.assert_as_if_at_once({"caption": "w1", "tags": "w2"})
    scores = jobs.column("SELECT clip_score FROM captions")
    assert len(scores) == NUM
    assert None not in scores
