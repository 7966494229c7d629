"""Flags, config files, exit codes."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from captioner.command_line import parse, run
from captioner.config import CaptionJobConfig, EvaluateConfig, FitConfig
from captioner.config.recipes import RECIPES, RecipeName
from captioner.errors import ConfigError, InputError, JobError


def caption_config(*arguments: str) -> CaptionJobConfig:
    return parse(CaptionJobConfig, arguments)


def test_without_arguments_the_demo_is_captioned_into_its_folder() -> None:
    config = caption_config()
    assert (config.input_path, config.output, config.model.model) == ("demo", "captions-demo", "demo")


def test_flags_of_every_group_stand_at_the_top_level() -> None:
    config = caption_config("in", "out", "--model", "m", "--limit", "3", "--num-beams", "4", "--workers", "1:8")
    assert (config.input_path, config.output) == ("in", "out")
    assert (config.model.model, config.input.limit, config.decoding.num_beams) == ("m", 3, 4)
    assert config.resources.workers == "1:8"


def test_lists_are_written_with_commas_and_mappings_as_json() -> None:
    config = caption_config("in", "out", "--keep-columns", "a,b=c", "--storage-options", '{"anon": true}')
    assert config.input.kept_columns == {"a": "a", "c": "b"}
    assert config.input.storage_options == {"anon": True}


def test_a_line_feed_can_be_a_stop_string(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text('stop: ["\\n", "."]\n')
    assert caption_config("in", "out", "--stop", "\n").decoding.stop == ("\n",)
    assert caption_config("in", "out", "--config", str(tmp_path / "job.yaml")).decoding.stop == ("\n", ".")


def test_a_config_file_sets_what_flags_do_not(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("input_path: in\noutput: out\nlimit: 4\nkeep-columns: [a, b]\ndo_sample: true\n")
    config = caption_config("--config", str(file), "--limit", "7")
    assert (config.input_path, config.output, config.input.limit) == ("in", "out", 7)
    assert config.input.keep_columns == ("a", "b")
    assert config.decoding.do_sample


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("workers: 1:8", "resources.workers", "1:8"),
        ("workers: 8", "resources.workers", "8"),
        ("seed: 010", "decoding.seed", 10),
        ("keep_columns: [no, yes]", "input.keep_columns", ("no", "yes")),
        ("keep_columns: no, yes", "input.keep_columns", ("no", "yes")),
        ("keep_columns: 2026-01-01", "input.keep_columns", ("2026-01-01",)),
        ("stop: ['a, b']", "decoding.stop", ("a, b",)),
        ("stop: ['[\"x\"]']", "decoding.stop", ('["x"]',)),
        ("stop: []", "decoding.stop", ()),
        ("do_sample: yes", "decoding.do_sample", True),
        ("do-sample: false", "decoding.do_sample", False),
        ("limit: null", "input.limit", None),
        ("limit:", "input.limit", None),
        ("image_column: 'null'", "input.image_column", "null"),
        ("image_column: -x", "input.image_column", "-x"),
        ("length_penalty: .5", "decoding.length_penalty", 0.5),
        ("storage_options: {anon: true, port: 9000, key: 010, x: 'no', y: [1, null]}", "input.storage_options",
         {"anon": True, "port": 9000, "key": "010", "x": "no", "y": [1, None]}),
        ("storage_options: '{\"anon\": true}'", "input.storage_options", {"anon": True}),
        ("", "input.limit", None),
    ],
)  # fmt: skip
def test_a_file_means_what_the_flags_mean(tmp_path: Path, text: str, name: str, value: object) -> None:
    (tmp_path / "job.yaml").write_text(text)
    config: Any = caption_config("in", "out", "--config", str(tmp_path / "job.yaml"))
    for part in name.split("."):
        config = getattr(config, part)
    assert (config, type(config)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "arguments", "paths"),
    [
        ("input_path: in", ["out"], ("in", "out")),
        ("output: out", ["in"], ("in", "out")),
        ("output: out", [], ("demo", "out")),
        ("input_path: in\noutput: out", [], ("in", "out")),
        ("input_path: in\noutput: out", ["other"], ("other", "out")),
        ("input_path: in", ["other", "out"], ("other", "out")),
        ("limit: 3", ["--num-beams", "4", "in", "--do-sample", "--num-beams=1", "out"], ("in", "out")),
    ],
)
def test_words_without_a_flag_are_those_that_the_file_leaves_open(
    tmp_path: Path, text: str, arguments: list[str], paths: tuple[str, str]
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    config = caption_config("--config", str(tmp_path / "job.yaml"), *arguments)
    assert (config.input_path, config.output) == paths


def test_a_file_and_flags_are_checked_together(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("num_captions: 4\ndo_sample: false\n")
    config = caption_config("in", "out", "--config", str(tmp_path / "job.yaml"), "--do-sample")
    assert (config.decoding.num_captions, config.decoding.do_sample) == (4, True)


RECIPE_WORDS = {
    "as it is": ("", [], {"epochs": 8, "image_tokens": 64, "learning_rate": 1e-3}),
    "a flag wins": (
        "",
        ["--epochs", "1", "--min-crop-area=1"],
        {"epochs": 1, "min_crop_area": 1.0, "image_tokens": 64},
    ),
    "a setting of a file wins": ("epochs: 3", [], {"epochs": 3, "image_tokens": 64}),
    "a flag wins over both": ("epochs: 3", ["--epochs", "1"], {"epochs": 1, "image_tokens": 64}),
    "the recipe in the file": ("recipe: patches", [], {"image_tokens": None, "min_crop_area": 0.5, "epochs": 8}),
    "the flag's recipe": ("recipe: patches", ["--recipe", "pooled-64"], {"image_tokens": 64}),
}


@pytest.mark.parametrize(("file", "flags", "expected"), RECIPE_WORDS.values(), ids=RECIPE_WORDS)
def test_a_recipe_sets_what_neither_flags_nor_a_file_do(
    tmp_path: Path, file: str, flags: list[str], expected: dict[str, object]
) -> None:
    (tmp_path / "fit.yaml").write_text(file)
    named = [] if "recipe" in file else ["--recipe", "pooled-64"]
    training = parse(FitConfig, ["--config", str(tmp_path / "fit.yaml"), *named, *flags]).training
    assert {name: getattr(training, name) for name in expected} == expected


@pytest.mark.parametrize("name", get_args(RecipeName))
def test_each_recipe_is_what_its_settings_say(name: str) -> None:
    training = parse(FitConfig, ["demo", f"--recipe={name}"]).training
    assert {field: getattr(training, field) for field in RECIPES[name].settings} == RECIPES[name].settings
    assert RECIPES.keys() == set(get_args(RecipeName))


def test_an_unknown_recipe_is_refused_as_any_flag_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(FitConfig, ["demo", "--recipe", "pooled-65"])
    assert "pooled-64" in capsys.readouterr().err


def test_gates_of_a_file_and_of_flags_all_hold(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("min: [cider=0.5, bleu_4=0.1]\n")
    config = parse(EvaluateConfig, ["a.csv", "b.csv", "--config", str(tmp_path / "job.yaml"), "--min", "rouge_l=0.2"])
    assert config.min == ["cider=0.5", "bleu_4=0.1", "rouge_l=0.2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit: [1]", "line 1: limit holds a list; expected one value"),
        ("x: 1", "unknown setting x; expected one of"),
        ("limit: 1\nlimit: 2", "line 2: limit is set twice; expected once"),
        ("do_sample: maybe", "line 1: do_sample is maybe; expected true or false"),
        ("storage_options: {anon: no}", "storage_options.anon is no; expected true or false, or quotes around a text"),
        ("storage_options: [1]", "storage_options holds a list; expected a mapping"),
        ("- 1", "holds a list; expected `name: value` lines"),
        ("[" * 5000, "job.yaml is nested too deep"),
    ],
)
def test_a_setting_of_another_kind_is_refused_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        caption_config("in", "out", "--config", str(tmp_path / "job.yaml"))


def test_a_text_with_a_comma_is_written_as_a_json_list() -> None:
    assert caption_config("in", "out", "--stop", '["a, b", "c"]').decoding.stop == ("a, b", "c")
    assert caption_config("in", "out", "--stop", '["a').decoding.stop == ('["a',)


def test_a_broken_config_file_is_not_quoted_for_it_may_hold_a_secret(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("limit: 1\nstorage_options: {secret: s3cr3t\n")
    with pytest.raises(ConfigError, match=r"job.yaml is not YAML: expected .*, line 3") as error:
        parse(CaptionJobConfig, ["--config", str(tmp_path / "job.yaml")])
    assert "s3cr3t" not in str(error.value)


def test_a_config_file_that_is_no_text_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\x80\x81")
    with pytest.raises(ConfigError, match=r"job.yaml is not YAML: 'utf-8' codec"):
        caption_config("--config", str(tmp_path / "job.yaml"))


def test_an_unknown_setting_in_a_file_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("max_new_token: 4\n")
    with pytest.raises(ConfigError, match="unknown setting max_new_token; did you mean max_new_tokens"):
        caption_config("--config", str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in"], "OUTPUT is missing; expected a folder for the captions of in"),
        (["in", "out", "--limit", "0"], "--limit is 0; expected at least 1"),
        (["in", "out", "--workers", "8:1"], "--workers is 8:1; expected `auto`, a number from 1 up, or `min:max`"),
        (["in", "out", "--device", "nope"], "--device is nope; expected auto, cpu, cuda or cuda:N"),
        (["in", "out", "--device", "mps"], "--device is mps; expected auto, cpu, cuda or cuda:N"),
        (["in", "out", "--length-penalty", "nan"], "--length-penalty is nan; expected a number that is finite"),
        (["in", "out", "--gpus-per-worker", "1.5"], "--gpus-per-worker is 1.5; expected a share of one GPU, or a whol"),
        (["in", "out", "--decode-timeout-s", "inf"], "--decode-timeout-s is inf; expected more than 0, at most 86400"),
        (["in", "out", "--drain-s", "-1"], "--drain-s is -1.0; expected 0 or more, at most 86400"),
        (["in", "out", "--drain-s", "inf"], "--drain-s is inf; expected 0 or more, at most 86400"),
        (["in", "out", "--top-p", "1.5"], "--top-p is 1.5; expected above 0, at most 1"),
        (
            ["in", "out", "--temperature", "0.7"],
            "--temperature is 0.7; expected --do-sample or --redraw-repetitive with it",
        ),
        (["in", "out", "--top-p", "0.9"], "--top-p is 0.9; expected --do-sample or --redraw-repetitive with it"),
        (["in", "out", "--top-k", "5"], "--top-k is 5; expected --do-sample or --redraw-repetitive with it"),
        (
            ["in", "out", "--min-p", "0.1", "--num-beams", "2"],
            "--min-p is 0.1; expected --do-sample or --redraw-repetitive with it",
        ),
        (["in", "out", "--redraw-repetitive", "-1"], "--redraw-repetitive is -1; expected 0 (off) to 100"),
        (["in", "out", "--redraw-repetitive", "2", "--num-beams", "3"], "is 2; expected 0 with --num-beams 3"),
        (["in", "out", "--num-captions", "3"], "--num-captions is 3; expected 1, or --do-sample, or --num-beams >= it"),
        (["in", "out", "--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
    ],
)
def test_wrong_use_exits_with_2_and_says_value_and_expectation(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(CaptionJobConfig, lambda config: {}, arguments) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_flag_exits_with_2_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(CaptionJobConfig, lambda config: {}, ["in", "out", "--limt", "3"])
    assert exit_info.value.code == 2
    assert "--limit" in capsys.readouterr().err


def raising(error: Exception) -> Any:
    def job(config: CaptionJobConfig) -> dict[str, Any]:
        raise error

    return job


def test_the_summary_is_the_last_line_of_stdout_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(CaptionJobConfig, lambda config: {"read": 3}, []) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"read": 3}


def test_a_job_that_failed_exits_with_1_and_wrong_use_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(CaptionJobConfig, raising(JobError("the disk is full")), []) == 1
    assert run(CaptionJobConfig, raising(InputError("nothing there")), []) == 2
    assert run(CaptionJobConfig, lambda config: {"ok": False}, []) == 1
    assert capsys.readouterr().err.splitlines() == ["error: the disk is full", "error: nothing there"]


def test_the_help_page_never_shows_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("storage_options: {secret: hunter2}\n")
    with pytest.raises(SystemExit):
        caption_config("--config", str(file), "--help")
    shown = capsys.readouterr().out
    assert "hunter2" not in shown
    assert "secret" in shown
