"""The two workers of a caption job, without Ray: rows in = rows out."""

import re
import threading
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from captioner.caption_columns import CAPTION_COLUMNS, Caption
from captioner.captioning.caption_worker import CaptionWorker, limit_gpu_memory
from captioner.captioning.captioner import Captioner
from captioner.captioning.decode_worker import DecodeWorker
from captioner.captioning.telemetry import NullRecorder
from captioner.config import CaptionJobConfig, ImageConfig, InputConfig, ModelConfig
from captioner.errors import JobError
from captioner.images import Decoded, Preprocessing, decode
from captioner.model.bundle import describe
from captioner.prompts import Prompt, answer_fields, num_tokens, read_prompts
from captioner.schema import captioned_schema, decoded_schema, source_schema
from captioner.storage.stop_file import StopFile
from tests.sample_images import BROKEN, encoded
from tests.unit.captioning.conftest import DECODING

KEPT = [pa.field("label", pa.string())]


def source(rows: list[dict[str, object]]) -> pa.Table:
    """Rows as read: keys and ids are made from the place."""
    base = {"attempt": 1, "label": "kept"}
    return pa.Table.from_pylist(
        [{"key": key, "image_id": f"image-{key}", **base, **row} for key, row in enumerate(rows)], source_schema(KEPT)
    )


def job(folder: Path, bundle: str, **image: object) -> CaptionJobConfig:
    return CaptionJobConfig(
        input_path=str(folder),
        output=str(folder / "out"),
        image=ImageConfig(**image),  # type: ignore[arg-type]
        model=ModelConfig(model=bundle),
        decoding=DECODING,
    )


def test_every_row_is_decoded_or_rejected_in_its_place(tmp_path: Path, bundle: str) -> None:
    (tmp_path / "one.png").write_bytes(encoded("PNG"))
    rows = source(
        [
            {"data": encoded("JPEG", size=(60, 50))},
            {"uri": str(tmp_path / "one.png")},
            {"uri": str(tmp_path / "gone.png")},
            {"reason": "corrupt", "detail": "the tar ends here"},
            *({"data": data} for data in BROKEN.values()),
        ]
    )
    decoder = DecodeWorker(job(tmp_path, bundle, max_image_pixels=50_000), describe(bundle).preprocessing, KEPT)
    decoded = decoder(rows)
    assert decoded.schema == decoded_schema(32, KEPT)
    assert decoded.column("key").to_pylist() == rows.column("key").to_pylist()
    assert decoded.column("reason").to_pylist() == [None, None, "missing", "corrupt", *BROKEN]
    assert decoded.column("pixels").is_valid().to_pylist() == [True, True, *[False] * 6]
    assert (decoded["width"][0].as_py(), decoded["height"][0].as_py()) == (60, 50)
    assert decoded["size_bytes"][1].as_py() == len(encoded("PNG"))
    assert set(decoded.column("label").to_pylist()) == {"kept"}


def test_every_table_that_is_kept_keeps_its_own_pixels_however_many_there_are(tmp_path: Path, bundle: str) -> None:
    decoder = DecodeWorker(job(tmp_path, bundle), describe(bundle).preprocessing, KEPT)
    files = [encoded("PNG", seed=seed) for seed in range(40)]
    kept = [decoder(source([{"data": b""}, {"data": data}])) for data in files]
    for data, table in zip(files, kept, strict=True):
        alone = decode(data, Preprocessing.from_config(describe(bundle).preprocessing), ImageConfig())
        assert isinstance(alone, Decoded)
        assert table["pixels"].to_pylist() == [None, alone.pixels.tobytes()]


def test_a_worker_logs_the_image_that_was_slow_to_decode(
    tmp_path: Path, bundle: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = source([{"data": b"none"}, {"data": encoded("JPEG", size=(60, 50))}])
    with caplog.at_level("INFO", "captioner"):
        DecodeWorker(job(tmp_path, bundle), describe(bundle).preprocessing, KEPT, slow_s=1000)(rows)
        assert "slow_decode" not in caplog.text
        DecodeWorker(job(tmp_path, bundle), describe(bundle).preprocessing, KEPT, slow_s=0)(rows)
    slowest = rows["image_id"][1].as_py()
    assert re.search(rf"slow_decode images=1 of=1 slowest={slowest} decode_ms=\d+", caplog.text)


def test_rows_that_were_read_before_a_job_is_to_stop_are_left_to_the_next_run(tmp_path: Path, bundle: str) -> None:
    rows, stop = source([{"data": encoded("JPEG")}]), StopFile(str(tmp_path / "_run"), "run-1")
    worker = DecodeWorker(job(tmp_path, bundle), describe(bundle).preprocessing, KEPT, stop)
    assert worker(rows).num_rows == 1
    stop.write()
    assert worker(rows).num_rows == 0
    assert worker(rows).schema == decoded_schema(32, KEPT)


def test_rows_that_wait_for_a_busy_model_when_a_job_is_to_stop_are_left_to_the_next_run(
    tmp_path: Path, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stop = job(tmp_path, bundle), StopFile(str(tmp_path / "_run"), "run-1")
    decoded = DecodeWorker(config, describe(bundle).preprocessing, KEPT)(source([{"data": encoded("JPEG")}] * 2))
    worker, has_begun, may_end = CaptionWorker(config, KEPT, stop=stop), threading.Event(), threading.Event()
    caption_pixels = worker.captioner.caption_pixels

    def slow(*arguments: object) -> list[Caption]:
        has_begun.set()
        may_end.wait(30)
        return caption_pixels(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(worker.captioner, "caption_pixels", slow)
    begun: list[pa.Table] = []
    thread = threading.Thread(target=lambda: begun.append(worker(decoded)))
    thread.start()
    assert has_begun.wait(30)
    stop.write()
    waiting = worker(decoded)
    assert (waiting.num_rows, waiting.schema) == (0, captioned_schema(KEPT))
    may_end.set()
    thread.join()
    assert begun[0].column("caption").null_count == 0
    assert worker(decoded).column("caption").null_count == 0, "an idle model takes what comes"
    worker.captioner.close()


def test_rejects_pass_the_model_and_every_other_row_gets_its_caption(
    tmp_path: Path, bundle: str, captioner: Captioner
) -> None:
    rows = source([{"data": encoded(seed=1)}, {"data": b""}, {"data": encoded(seed=2)}])
    config = job(tmp_path, bundle)
    captioned = CaptionWorker(config, KEPT)(DecodeWorker(config, describe(bundle).preprocessing, KEPT)(rows))
    assert captioned.schema == captioned_schema(KEPT)
    assert captioned.column("reason").to_pylist() == [None, "empty", None]
    expected = [one for one in captioner.caption([encoded(seed=1), encoded(seed=2)]) if isinstance(one, Caption)]
    assert captioned.column("caption").to_pylist() == [str(expected[0]), None, str(expected[1])]
    assert captioned.column("num_tokens").to_pylist() == [expected[0].num_tokens, None, expected[1].num_tokens]
    assert set(captioned.column("finish_reason").to_pylist()) <= {"length", "stop", None}
    assert captioned["mean_logprob"][0].as_py() >= captioned["min_logprob"][0].as_py()


def test_a_store_that_refuses_a_whole_batch_ends_the_job_unless_its_rows_failed_before(
    tmp_path: Path, bundle: str
) -> None:
    decoder = DecodeWorker(job(tmp_path, bundle), describe(bundle).preprocessing, KEPT)
    refused = [{"uri": f"memory2://nobody/{n}.jpg"} for n in range(256)]
    again = decoder(source([{**row, "attempt": 2} for row in refused]))
    assert set(again.column("reason").to_pylist()) == {"fetch_failed"}
    with pytest.raises(JobError, match="256 images in a row did not arrive"):
        decoder(source(refused))


def test_a_batch_of_rejects_needs_no_model(tmp_path: Path, bundle: str) -> None:
    config = job(tmp_path, bundle)
    rows = DecodeWorker(config, describe(bundle).preprocessing, KEPT)(source([{"data": b""}]))
    assert CaptionWorker(config, KEPT)(rows).column("caption").to_pylist() == [None]


@pytest.mark.parametrize(
    ("gpus_per_worker", "is_available", "kept"),
    [(0.25, True, [0.25]), (1, True, []), (4, True, []), (0, True, []), (None, True, []), (0.25, False, [])],
)
def test_a_worker_that_shares_a_gpu_keeps_to_its_share_of_the_memory(
    gpus_per_worker: float | None, is_available: bool, kept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", found.append)
    limit_gpu_memory(gpus_per_worker)
    assert found == kept


PROMPTS = """
caption: "w1"
said: {text: "w2 {?label: w3 {label}} {label}", max_value_tokens: 3}
choice: {text: "w4", choice: [yes, no], max_new_tokens: 8}
cut: {text: "w4", regex: "[a-z]{40}", max_new_tokens: 5}
drawn: {texts: [w5, {text: w6, weight: 2}], do_sample: true, num_captions: 2}
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory, bundle: str) -> tuple[pa.Table, pa.Table, list[Prompt]]:
    """What a worker makes of three rows, one of them no image, with prompts; the decoded rows; the prompts."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "prompts.yaml").write_text(PROMPTS)
    prompts = list(read_prompts(folder / "prompts.yaml", DECODING, frozenset()))
    rows: list[dict[str, object]] = [
        {"data": encoded(seed=1), "label": None},
        {"data": b""},
        {"data": encoded(seed=2), "label": "w7 w8 w9 w10 w11"},
    ]
    config = replace(job(folder, bundle), input=InputConfig(keep_columns=("label",)))
    decoded = DecodeWorker(config, describe(bundle).preprocessing, KEPT)(source(rows))
    return CaptionWorker(config, KEPT, prompts=prompts)(decoded), decoded, prompts


def test_a_worker_with_prompts_fills_a_column_for_each(answered: tuple[pa.Table, pa.Table, list[Prompt]]) -> None:
    found, _, prompts = answered
    answers = answer_fields({prompt.name: prompt.identity for prompt in prompts})
    assert found.schema == captioned_schema(KEPT, answers)
    is_image = [True, False, True]
    for field in answers:
        assert found.column(field.name).is_valid().to_pylist() == ([False] * 3 if field.name == "cut" else is_image)
    first, _, last = found.to_pylist()
    assert {first["choice"], last["choice"]} <= {"yes", "no"}
    assert (first["cut_details"]["finish_reason"], first["cut_details"]["num_tokens"]) == ("length", 5)
    assert (first["said_details"]["num_cut_values"], last["said_details"]["num_cut_values"]) == (0, 2)
    assert {first["drawn_details"]["text_number"], last["drawn_details"]["text_number"]} <= {0, 1}
    assert first["drawn_details"]["candidates"][0]["caption"] == first["drawn"]
    assert first["caption_details"] == {"text_number": 0, "num_cut_values": 0}
    assert [first["label"], last["label"]] == [None, "w7 w8 w9 w10 w11"]


def test_the_caption_of_prompts_is_that_of_its_prompt_alone(
    answered: tuple[pa.Table, pa.Table, list[Prompt]], tmp_path: Path, bundle: str
) -> None:
    found, decoded, prompts = answered
    config = replace(job(tmp_path, bundle), input=InputConfig(keep_columns=("label",)))
    fixed = [column.name for column in CAPTION_COLUMNS if "logprob" not in column.name]
    for some in (prompts[:1], list(reversed(prompts)), [prompts[3], prompts[0], prompts[1]]):
        other = CaptionWorker(config, KEPT, prompts=some)(decoded)
        assert other.select(fixed).equals(found.select(fixed))
        for prompt in some:
            if prompt.name != "caption":
                assert other.column(prompt.name).equals(found.column(prompt.name)), prompt.name


def test_values_are_found_under_the_name_that_their_column_is_kept_as(
    answered: tuple[pa.Table, pa.Table, list[Prompt]], tmp_path: Path, bundle: str
) -> None:
    found, decoded, prompts = answered
    kept = [pa.field("mine", pa.string())]
    names = ["mine" if name == "label" else name for name in decoded.column_names]
    config = replace(job(tmp_path, bundle), input=InputConfig(keep_columns=("label=mine",)))
    other = CaptionWorker(config, kept, prompts=prompts)(decoded.rename_columns(names))
    assert other.column("said").equals(found.column("said"))


def test_tokens_of_all_answers_are_counted(
    answered: tuple[pa.Table, pa.Table, list[Prompt]], tmp_path: Path, bundle: str
) -> None:
    found, decoded, prompts = answered
    counted: dict[str, float] = {}

    class Notebook(NullRecorder):
        def count(self, name: str, number: float, **_: str) -> None:
            counted[name] = counted.get(name, 0) + number

    config = replace(job(tmp_path, bundle), input=InputConfig(keep_columns=("label",)))
    CaptionWorker(config, KEPT, recorder=Notebook(), prompts=prompts)(decoded)
    answers = answer_fields({prompt.name: prompt.identity for prompt in prompts})
    assert counted["captioner_tokens"] == num_tokens(found.filter(pc.is_null(found.column("reason"))), answers)
