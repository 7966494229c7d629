"""What was meant otherwise is refused with how to give it. Each message by its text."""

import errno
import re
from pathlib import Path

import botocore.exceptions
import pytest

from captioner.config import InputConfig
from captioner.errors import ConfigError, InputError, JobError
from captioner.inputs import Frozen, freeze
from captioner.inputs.listing import listed_ids
from captioner.inputs.remedies import for_missing_path
from captioner.schema import RejectReason
from captioner.storage.faults import StoreError, diagnose, output_errors
from tests.sample_images import encoded


def frozen(path: Path | str, folder: Path, **access: object) -> Frozen:
    return freeze(str(path), InputConfig(**access), str(folder / "_run"))  # type: ignore[arg-type]


def refuses(text: str, path: Path | str, folder: Path, error: type[Exception] = InputError, **access: object) -> None:
    with pytest.raises(error, match=re.escape(text)):
        frozen(path, folder, **access)


def test_a_data_set_of_the_hub_is_told_its_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "does not exist; expected a file, a folder or prefix, a glob or braces as {0000..0099}. A data set of the"
    refuses(f"{text} Hugging Face hub is read as hf://datasets/nlphuji/flickr30k", "nlphuji/flickr30k", tmp_path)
    (tmp_path / "photos").mkdir()
    for path in ("photos/cats", "a/b/c", "photos2/a.jpg"):
        assert for_missing_path(str(Path(path).absolute())) == ""


@pytest.mark.parametrize("path", ["C:\\Users\\me\\photos", "C:/Users/me/photos"])
def test_a_path_of_windows_is_told_as_wsl_has_it(path: str, tmp_path: Path) -> None:
    refuses("A path of Windows is /mnt/c/Users/me/photos under WSL", path, tmp_path)


LOG = "2026-01-01 00:00:00,000 captioner listed=5000\n2026-01-01 00:00:01,000 captioner workers=1:1 gpus=0\n"


def test_a_log_is_no_list(tmp_path: Path) -> None:
    log = tmp_path / "job.txt"
    log.write_text("\n" + LOG)
    text = f"{log}, line 1: '2026-01-01 00:00:00,000 captioner listed=5000' is no URI of an image; expected one URI a"
    refuses(text, log, tmp_path)
    log.rename(tmp_path / "job.log")
    refuses("job.log ends in .log; expected an image, a .tar, a .parquet", tmp_path / "job.log", tmp_path)


def test_a_list_of_names_with_spaces_is_one(tmp_path: Path) -> None:
    names = ["my cat on a mat.jpg", "http://example.com/a b c", "plain"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert frozen(tmp_path / "names.txt", tmp_path).num_images == 3


def test_a_folder_of_save_to_disk_is_told_how_it_becomes_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (folder / name).touch()
    text = f"becomes Parquet by datasets.load_from_disk('{folder}').to_parquet(\"images.parquet\")"
    refuses(text, folder, tmp_path)


def test_columns_of_an_image_folder_come_by_its_list(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded())
    (folder / "metadata.csv").write_text("file_name,text\na.jpg,a cat\n")
    text = (
        f"--keep-columns: {folder} is image files, which have no columns; expected no such flag, or the list of these"
        f" images as INPUT: {folder}/metadata.csv"
    )
    refuses(text, folder, tmp_path, error=ConfigError, keep_columns=("text",))
    found = frozen(folder / "metadata.csv", tmp_path, keep_columns=("text",))
    ids = listed_ids(found, str(tmp_path / "_run"))(0)
    assert ids is not None
    assert ids.to_pylist() == [f"{folder}/a.jpg"]


def test_missing_credentials_of_s3_name_the_variables() -> None:
    fault = diagnose(botocore.exceptions.NoCredentialsError())
    assert fault.reason == RejectReason.FORBIDDEN
    assert fault.detail == (
        "NoCredentialsError: Unable to locate credentials; expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or"
        """ AWS_PROFILE, or, of a public bucket, --storage-options '{"anon": true}'"""
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_and_what_to_do(number: int, tmp_path: Path) -> None:
    fault = diagnose(OSError(number, "No space left on device"))
    text = "cannot be written: the disk is full, or a quota used up: OSError: "
    with pytest.raises(JobError, match=text) as error, output_errors(str(tmp_path)):
        raise StoreError(fault)
    assert str(error.value).endswith("; free some space there, and the same command continues")
    assert "fetch_failed" not in str(error.value)
