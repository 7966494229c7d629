"""Images are encoded many at a time, from any thread, to what each gives alone."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from captioner.errors import ShapeError
from captioner.model.bundle import load
from captioner.model.caption_model import CaptionModel
from captioner.model.image_encoder import ImageEncoder, pixel_tensor
from tests.bundles import save_tiny_bundle
from tests.unit.model.operation_recorder import OperationRecorder
from tests.unit.model.tiny_models import edit_json

PIXELS = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CaptionModel:
    bundle = save_tiny_bundle(tmp_path_factory.mktemp("bundle"))
    edit_json(Path(bundle, "bundle.json"), template="<|begin_of_text|>{image}an image")
    return load(bundle, device="cpu")


@pytest.fixture(params=["recorded", "eager"])
def encoder(model: CaptionModel, request: pytest.FixtureRequest) -> ImageEncoder:
    recorder = OperationRecorder() if request.param == "recorded" else None
    return ImageEncoder(model, num_rows=8, is_scored=False, recorder=recorder)


def test_the_encoding_of_an_image_does_not_depend_on_its_batch_or_earlier_ones(
    model: CaptionModel, encoder: ImageEncoder
) -> None:
    together, joint = encoder(PIXELS[:8])
    expected = model.request_embeddings(model.encode(PIXELS[:8]))
    assert joint.shape == (8, 0)
    assert torch.equal(together, expected)
    for number in (1, 3):
        alone, _ = encoder(PIXELS[:number])
        assert torch.equal(alone, together[:number])
    encoder(PIXELS[8:16])
    assert torch.equal(together, expected), "a later call must not overwrite what an earlier one returned"


@pytest.mark.parametrize("in_lists", [False, True])
def test_the_pixels_of_a_column_are_its_own_memory(in_lists: bool) -> None:
    squares = pa.array([square.numpy().tobytes() for square in PIXELS[:6]], pa.binary(3 * 32 * 32))
    column = pa.ListArray.from_arrays([0, 1, 3, 6], squares).slice(1) if in_lists else squares.slice(1)
    pixels = pixel_tensor(pa.chunked_array([column]), 32)
    assert torch.equal(pixels, PIXELS[1:6])
    assert pixels.data_ptr() == squares.buffers()[1].address + 3 * 32 * 32
    assert pixel_tensor(pa.chunked_array([column.slice(len(column))]), 32).shape == (0, 3, 32, 32)


def test_calls_of_many_threads_get_their_own_images(encoder: ImageEncoder) -> None:
    expected = [encoder(PIXELS[start : start + 2])[0] for start in range(0, 20, 2)]
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda start: encoder(PIXELS[start : start + 2])[0], range(0, 20, 2)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_pixels_of_another_type_or_size_are_refused(encoder: ImageEncoder) -> None:
    with pytest.raises(ShapeError, match=r"float32\[1, 3, 32, 32\]; expected torch.uint8\[B, 3, 32, 32\]"):
        encoder(PIXELS[:1].float())
    with pytest.raises(ShapeError, match=r"uint8\[1, 3, 16, 16\]"):
        encoder(PIXELS[:1, :, :16, :16])


def test_the_prompt_after_the_image_is_embedded_once_and_serves_a_fit_too(
    model: CaptionModel, encoder: ImageEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder(PIXELS[:1])
    monkeypatch.setattr(model.llama, "get_input_embeddings", None)
    learned = torch.randn(2, 1, 64, requires_grad=True)
    request = model.request_embeddings(learned)
    assert request.shape[1] > 1
    (request * request).sum().backward()  # type: ignore[no-untyped-call]
    assert learned.grad is not None
