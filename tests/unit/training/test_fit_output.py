"""The folder of a fit: whose it is, and that no other fit or model is written over."""

import json
import pickle

import pytest

from captioner.errors import OutputError
from captioner.training.fit.fit_output import FitOutput

IDENTITY = {"training": {"seed": 1, "batch_size": 8}, "labels": "abc"}


def test_a_bundle_that_no_fit_has_written_is_refused(tmp_path):
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises(OutputError, match="no fit has written it"):
        FitOutput(str(tmp_path)).check_owner()


def test_a_model_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"holds config\.json"):
        FitOutput(str(tmp_path)).check_owner()


def test_an_earlier_run_of_the_same_fit_may_be_continued(tmp_path):
    output = FitOutput(str(tmp_path))
    output.claim(IDENTITY)
    (tmp_path / "bundle.json").write_text("{}")
    output.check_owner()
    output.claim(json.loads(json.dumps(IDENTITY)))
    assert output.has_bundle


def test_another_fit_is_refused_by_naming_what_differs(tmp_path):
    output = FitOutput(str(tmp_path))
    output.claim(IDENTITY)
    with pytest.raises(OutputError, match=r"training\.seed: 1 there, 2 now") as raised:
        output.refuse_other_fit({**IDENTITY, "training": {"seed": 2, "batch_size": 8}})
    assert "batch_size" not in str(raised.value)


def test_settings_are_checked_before_labels_are_known_and_labels_after(tmp_path):
    output = FitOutput(str(tmp_path))
    output.claim(IDENTITY)
    output.refuse_other_fit({"training": IDENTITY["training"]})
    with pytest.raises(OutputError, match="labels: abc there, def now"):
        output.refuse_other_fit({**IDENTITY, "labels": "def"})


def test_a_damaged_record_is_named(tmp_path):
    output = FitOutput(str(tmp_path))
    output.write("run.json", b"{")
    with pytest.raises(OutputError, match=r"run\.json is damaged"):
        output.identity()


def test_an_output_on_a_store_keeps_its_files_there(s3):
    output = pickle.loads(pickle.dumps(FitOutput(f"{s3.url}/bundle", s3.server.storage_options)))
    assert output.read("checkpoint.pt") is None
    output.write("checkpoint.pt", b"state")
    assert output.read("checkpoint.pt") == b"state"
    output.claim(IDENTITY)
    assert output.identity() == {"format": 1, **IDENTITY}
