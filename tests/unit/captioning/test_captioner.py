"""Captions of images without rows and without Ray: a notebook's captioner."""

import io
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import captioner as package
from captioner.caption_columns import Caption
from captioner.captioning.captioner import Captioner, image_seed
from captioner.config import DecodingConfig
from captioner.errors import ConfigError, EngineError, InputError
from captioner.model.bundle import load
from captioner.schema import Reject, RejectReason
from tests.sample_images import encoded, sample_image
from tests.unit.captioning.conftest import DECODING
from tests.unit.model.operation_recorder import OperationRecorder


def test_the_package_itself_gives_the_captioner() -> None:
    assert package.Captioner is Captioner
    with pytest.raises(AttributeError, match="has no attribute nothing"):
        getattr(package, "nothing")  # noqa: B009


def same(one: object, other: object) -> bool:
    """The same tokens exactly; scores but for the last bits, which depend on the row of a matrix product."""
    assert isinstance(one, Caption)
    assert isinstance(other, Caption)
    is_near = one.mean_logprob == pytest.approx(other.mean_logprob, rel=1e-5)
    return is_near and (one.caption, one.num_tokens) == (other.caption, other.num_tokens)


def test_a_notebook_captions_pil_images_bytes_and_paths(tmp_path: Path, captioner: Captioner) -> None:
    path = tmp_path / "one.png"
    path.write_bytes(encoded("PNG"))
    captions = captioner.caption([sample_image(), encoded("PNG"), path, str(path)])
    assert all(isinstance(caption, Caption) for caption in captions)
    assert len({str(caption) for caption in captions}) == 1


def test_a_notebook_does_not_wait_for_a_pipe(tmp_path: Path, captioner: Captioner) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    pipe, strange = captioner.caption([tmp_path / "pipe.jpg", "a\0b"])
    assert isinstance(pipe, Reject)
    assert isinstance(strange, Reject)
    assert "is not a file but a folder, a device or a pipe" in pipe.detail


def test_one_image_gives_its_caption_and_several_a_list_whatever_they_are(tmp_path: Path, captioner: Captioner) -> None:
    """PIL, numpy in colour and with transparency, bytes, paths, open files: the same pixels, the same caption."""
    path = tmp_path / "image.png"
    path.write_bytes(encoded("PNG"))
    colour = np.asarray(sample_image().convert("RGB"))
    opaque = np.dstack([colour, np.full(colour.shape[:2], 255, np.uint8)])
    data = encoded("PNG")
    with path.open("rb") as file:
        images = [sample_image(), colour, opaque, data, bytearray(data), memoryview(data), path, str(path), file]
        several = captioner.caption(images)
    alone = captioner.caption(path)
    assert isinstance(alone, Caption)
    assert [str(found) for found in several] == [str(alone)] * len(images)
    assert [str(captioner.caption(image)) for image in (sample_image(), colour, io.BytesIO(data))] == [str(alone)] * 3
    batch = captioner.caption(np.stack([colour, colour]))  # four dimensions are several images
    assert [str(found) for found in batch] == [str(alone)] * 2
    grey = captioner.caption(np.zeros((30, 20), np.uint8))
    assert isinstance(grey, Caption)


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (
            None,
            "an image is a NoneType; expected a PIL image, a numpy array of uint8[H, W, 3] or [H, W], bytes",
        ),
        (np.zeros((4, 4, 3)), "an image is a numpy array of float64[4, 4, 3]; expected a PIL image"),
        (np.zeros((3, 5, 5), np.uint8), "an image is a numpy array of uint8[3, 5, 5]; expected a PIL image"),
        (io.StringIO("a"), "an image is a file of str; expected one that is open for bytes, as 'rb'"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_pass(captioner: Captioner, image: Any, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        captioner.caption([image])


def test_a_reject_is_never_taken_for_a_caption(captioner: Captioner) -> None:
    found = captioner.caption(b"<html>")
    assert isinstance(found, Reject)
    for as_text in (str, "{}".format, "caption: {0}".format):
        with pytest.raises(TypeError, match=r"this image has no caption \(not_an_image: .*\); ask isinstance"):
            as_text(found)
    assert "not_an_image" in repr(found)


def test_options_are_given_by_their_names_and_a_wrong_one_is_named(bundle: str) -> None:
    with Captioner.from_bundle(bundle, num_beams=3, max_new_tokens=4, device="cpu", slots="8") as beams:
        assert (beams.decoding.num_beams, beams.decoding.max_new_tokens) == (3, 4)
        assert isinstance(beams.caption(encoded("PNG")), Caption)
    with pytest.raises(EngineError):
        beams.caption(encoded("PNG"))  # it was closed
    with pytest.raises(ConfigError, match="num_beam is no option of captioning; did you mean num_beams"):
        Captioner.from_bundle(bundle, num_beam=3)
    with pytest.raises(ConfigError, match=r"--temperature is 0.5; expected --do-sample or --redraw-repetitive with it"):
        Captioner.from_bundle(bundle, temperature=0.5)


def test_an_image_without_a_caption_is_returned_with_its_reason(tmp_path: Path, captioner: Captioner) -> None:
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
    encode, submit = captioner.encoder.__call__, captioner.engine.submit

    def count(pixels: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        encoded_images.append(len(pixels))
        return encode(pixels, sizes)

    monkeypatch.setattr(captioner, "encoder", count)
    monkeypatch.setattr(captioner.encoder, "num_rows", 8, raising=False)
    monkeypatch.setattr(captioner.engine, "submit", lambda requests: has_room.wait(60) and submit(requests))
    size = captioner.model.image_size
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(captioner.caption_pixels, torch.zeros(8, 3, size, size, dtype=torch.uint8), ["same"] * 8)
            for _ in range(4)
        ]
        while not encoded_images and not any(call.done() for call in calls):
            time.sleep(0.01)
        time.sleep(0.2)
        assert encoded_images == [8]
        has_room.set()
        assert [len(call.result(timeout=60)) for call in calls] == [8] * 4
    assert encoded_images == [8] * 4


def test_several_captions_of_an_image_are_all_kept_best_first(bundle: str) -> None:
    captioner = Captioner.from_bundle(bundle, DecodingConfig(max_new_tokens=6, do_sample=True, num_captions=3))
    [caption] = captioner.caption([sample_image()])
    captioner.close()
    assert isinstance(caption, Caption)
    assert len(caption.candidates) == 3
    scores = [candidate.mean_logprob for candidate in caption.candidates]
    assert scores == sorted(scores, reverse=True)
    assert caption.caption == caption.candidates[0].caption


def test_a_stop_string_ends_the_caption_and_is_not_part_of_it(bundle: str, captioner: Captioner) -> None:
    [whole] = captioner.caption([sample_image(3)])
    stop = str(whole)[2]
    stopped = Captioner.from_bundle(bundle, DecodingConfig(max_new_tokens=8, stop=(stop,)))
    [caption] = stopped.caption([sample_image(3)])
    stopped.close()
    assert isinstance(caption, Caption)
    assert str(caption) == str(whole)[: str(whole).index(stop)].rstrip()
    assert caption.finish_reason == "stop"


def test_a_seed_belongs_to_an_image_and_to_the_jobs_seed() -> None:
    assert image_seed(0, "a") == image_seed(0, "a")
    assert len({image_seed(0, "a"), image_seed(0, "b"), image_seed(1, "a"), image_seed(10, "a")}) == 4


def test_where_recording_pays_a_job_records_clip_and_every_step_and_writes_the_same_captions(
    bundle: str, captioner: Captioner
) -> None:
    notebooks: list[OperationRecorder] = []

    def recorder_for(device: torch.device) -> OperationRecorder:
        notebooks.append(OperationRecorder())
        return notebooks[-1]

    recorded = Captioner(load(bundle), DECODING, slots="16", recorder_for=recorder_for)
    images = [encoded(seed=seed) for seed in range(12)]
    found = recorded.caption(images)
    recorded.close()
    of_clip, of_steps = notebooks  # graphs of one recorder share memory, and these run at the same time
    assert (len(of_clip.operations), of_clip.num_replays) == (1, 2)
    assert of_steps.num_replays >= 8
    assert all(same(one, other) for one, other in zip(found, captioner.caption(images), strict=True))
