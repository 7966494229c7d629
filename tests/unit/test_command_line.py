"""Flags, config files, exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest

from captioner.command_line import parse, run
from captioner.config import CaptionJobConfig
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
    assert config.input.kept == {"a": "a", "c": "b"}
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
        (["in", "out", "--device", "nope"], "--device is nope; expected auto, cpu, mps, cuda or cuda:N"),
        (["in", "out", "--length-penalty", "nan"], "--length-penalty is nan; expected a number that is finite"),
        (["in", "out", "--gpus-per-worker", "1.5"], "--gpus-per-worker is 1.5; expected a share of one GPU, or a whol"),
        (["in", "out", "--decode-timeout-s", "inf"], "--decode-timeout-s is inf; expected more than 0, at most 86400"),
        (["in", "out", "--top-p", "1.5"], "--top-p is 1.5; expected above 0, at most 1"),
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
