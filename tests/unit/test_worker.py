"""The two workers and the notebook's captioner, without Ray."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from captioner import worker
from captioner.config import CaptionJobConfig, DecodingConfig, ImageConfig, ModelConfig
from captioner.decode_worker import DecodeWorker
from captioner.errors import InputError, JobError
from captioner.model.bundle import describe
from captioner.rows import Reject, RejectReason, captioned_schema, decoded_schema, source_schema
from captioner.stopping import StopFile
from captioner.worker import Caption, Captioner, CaptionWorker, image_seed
from tests.bundles import save_tiny_bundle
from tests.pictures import BROKEN, encoded, picture
from tests.unit.notebook import Notebook

KEPT = [pa.field("label", pa.string())]
DECODING = DecodingConfig(max_new_tokens=8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def captioner(bundle: str) -> Iterator[Captioner]:
    captioner = Captioner.from_bundle(bundle, DECODING)
    yield captioner
    captioner.close()


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


def same(one: object, other: object) -> bool:
    """The same tokens exactly; scores but for the last bits, which depend on the row of a matrix product."""
    assert isinstance(one, Caption)
    assert isinstance(other, Caption)
    is_near = one.mean_logprob == pytest.approx(other.mean_logprob, rel=1e-5)
    return is_near and (one.caption, one.num_tokens) == (other.caption, other.num_tokens)


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


def test_a_notebook_captions_pil_images_bytes_and_paths(tmp_path: Path, captioner: Captioner) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(encoded("PNG"))
    captions = captioner.caption([picture(), encoded("PNG"), path, str(path)])
    assert all(isinstance(caption, Caption) for caption in captions)
    assert len({str(caption) for caption in captions}) == 1


def test_a_notebook_does_not_wait_for_a_pipe(tmp_path: Path, captioner: Captioner) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    pipe, strange = captioner.caption([tmp_path / "pipe.jpg", "a\0b"])
    assert isinstance(pipe, Reject)
    assert isinstance(strange, Reject)
    assert "is not a file but a folder, a device or a pipe" in pipe.detail


def test_a_notebook_that_passes_no_list_or_no_image_is_told_what_to_pass(captioner: Captioner) -> None:
    with pytest.raises(InputError, match=r"images is one str; expected a list of images: \[image\]"):
        captioner.caption("a.jpg")
    with pytest.raises(InputError, match="an image is a NoneType; expected a PIL image, bytes or a path"):
        captioner.caption([None])  # type: ignore[list-item]


def test_a_notebook_is_told_why_an_image_has_no_caption(tmp_path: Path, captioner: Captioner) -> None:
    broken, missing = captioner.caption([b"<html>", tmp_path / "gone.png"])
    assert isinstance(broken, Reject)
    assert broken.reason == RejectReason.NOT_AN_IMAGE
    assert isinstance(missing, Reject)
    assert missing.reason == RejectReason.MISSING


@pytest.mark.parametrize("decoding", [DECODING, DecodingConfig(max_new_tokens=8, do_sample=True, seed=3)])
def test_a_caption_does_not_depend_on_its_batch_its_order_or_its_neighbours(
    bundle: str, decoding: DecodingConfig
) -> None:
    images = {str(seed): encoded(seed=seed) for seed in range(21)}
    captioner = Captioner.from_bundle(bundle, decoding, slots="16")
    together = dict(zip(images, captioner.caption(list(images.values()), list(images)), strict=True))
    assert len({str(caption) for caption in together.values()}) > 5
    for name in reversed(images):
        [alone] = captioner.caption([images[name]], [name])
        assert same(alone, together[name])
    captioner.close()


def test_many_threads_share_one_engine_and_get_their_own_captions(captioner: Captioner) -> None:
    alone = [captioner.caption([encoded(seed=seed)])[0] for seed in range(6)]
    found: dict[int, object] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: captioner.caption([encoded(seed=seed)])[0]}))
        for seed in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[seed], alone[seed]) for seed in range(6))


def test_while_a_call_waits_for_room_no_other_encodes_more_images(
    captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaVA's prefixes take 5 MB each: eight calls with 64 of them in hand would fill a card."""
    has_room, encoded_images = threading.Event(), []
    encode, submit = captioner.encoder.__call__, captioner._engine.submit
    monkeypatch.setattr(captioner, "encoder", lambda pixels: encoded_images.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(captioner.encoder, "num_rows", 8, raising=False)
    monkeypatch.setattr(captioner._engine, "submit", lambda requests: has_room.wait(60) and submit(requests))
    size = captioner.model.image_size
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(captioner.caption_pixels, torch.zeros(8, 3, size, size, dtype=torch.uint8), ["same"] * 8)
            for _ in range(4)
        ]
        while not encoded_images:
            time.sleep(0.01)
        time.sleep(0.2)
        assert encoded_images == [8]
        has_room.set()
        assert [len(call.result(timeout=60)) for call in calls] == [8] * 4
    assert encoded_images == [8] * 4


def test_several_captions_of_an_image_are_all_kept_best_first(bundle: str) -> None:
    captioner = Captioner.from_bundle(bundle, DecodingConfig(max_new_tokens=6, do_sample=True, num_captions=3))
    [caption] = captioner.caption([picture()])
    captioner.close()
    assert isinstance(caption, Caption)
    assert len(caption.candidates) == 3
    scores = [candidate.mean_logprob for candidate in caption.candidates]
    assert scores == sorted(scores, reverse=True)
    assert caption.caption == caption.candidates[0].caption


def test_a_stop_string_ends_the_caption_and_is_not_part_of_it(bundle: str, captioner: Captioner) -> None:
    [whole] = captioner.caption([picture(3)])
    stop = str(whole)[2]
    stopped = Captioner.from_bundle(bundle, DecodingConfig(max_new_tokens=8, stop=(stop,)))
    [caption] = stopped.caption([picture(3)])
    stopped.close()
    assert isinstance(caption, Caption)
    assert str(caption) == str(whole)[: str(whole).index(stop)].rstrip()
    assert caption.finish_reason == "stop"


def test_a_seed_belongs_to_an_image_and_to_the_jobs_seed() -> None:
    assert image_seed(0, "a") == image_seed(0, "a")
    assert len({image_seed(0, "a"), image_seed(0, "b"), image_seed(1, "a"), image_seed(10, "a")}) == 4


def test_where_recording_pays_a_job_records_clip_and_every_step_and_writes_the_same_captions(
    bundle: str, captioner: Captioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebooks: list[Notebook] = []

    def recorder_for(device: torch.device) -> Notebook:
        notebooks.append(Notebook())
        return notebooks[-1]

    monkeypatch.setattr(worker, "recorder_for", recorder_for)
    recorded = Captioner.from_bundle(bundle, DECODING, slots="16")
    images = [encoded(seed=seed) for seed in range(12)]
    found = recorded.caption(images)
    recorded.close()
    of_clip, of_steps = notebooks  # graphs of one recorder share memory, and these run at the same time
    assert (len(of_clip.operations), of_clip.num_replays) == (1, 2)
    assert of_steps.num_replays >= 8
    assert all(same(one, other) for one, other in zip(found, captioner.caption(images), strict=True))


@pytest.mark.parametrize(
    ("gpus_per_worker", "is_available", "kept"),
    [(0.25, True, [0.25]), (1, True, []), (4, True, []), (0, True, []), (None, True, []), (0.25, False, [])],
)
def test_a_worker_that_shares_a_card_keeps_to_its_part_of_the_memory(
    gpus_per_worker: float | None, is_available: bool, kept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", found.append)
    worker._keep_to_share(gpus_per_worker)
    assert found == kept
