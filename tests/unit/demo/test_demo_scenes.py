import io
import itertools
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, LlamaForCausalLM

from captioner.demo import bundle_path, images_path, scenes

MAX_BYTES = 10 * 1000 * 1000


@pytest.fixture(scope="module")
def sample():
    return [scenes.scene_at(index) for index in range(400)]


def test_the_same_index_gives_the_same_file_and_another_index_another():
    assert scenes.example_at(7) == scenes.example_at(7)
    assert scenes.example_at(7).image != scenes.example_at(7, seed=1).image
    assert len({scenes.example_at(index).image for index in range(50)}) == 50


def test_a_repeated_scene_is_drawn_differently():
    seen = {}
    keys = ((scenes.scene_at(index), index % len(scenes.FORMATS)) for index in itertools.count())
    again = ((seen.setdefault(key, index), index) for index, key in enumerate(keys))
    first, second = next(pair for pair in again if pair[0] != pair[1])
    one, other = (Image.open(io.BytesIO(scenes.example_at(index).image)).convert("RGB") for index in (first, second))
    assert one.tobytes() != other.tobytes()


def test_no_description_is_in_two_splits():
    splits = {name: {e.captions for e in scenes.examples(name, 300)} for name in ("train", "validation", "test")}
    for one, other in itertools.combinations(splits.values(), 2):
        assert not one & other


def test_the_splits_share_all_scenes_as_eight_to_one_to_one():
    every = [scene.split for scene in scenes.all_scenes()]
    assert len(every) > 10_000
    for name, share in {"train": 0.8, "validation": 0.1, "test": 0.1}.items():
        assert every.count(name) / len(every) == pytest.approx(share, abs=0.01)


def test_the_examples_of_a_split_belong_to_it_and_have_five_captions():
    for example in scenes.examples("validation", 20):
        assert example.split == example.scene.split == "validation"
        assert len(set(example.captions)) == 5


def test_every_reference_is_parsed_as_its_scene(sample):
    for scene in sample:
        assert [scenes.parse(caption) for caption in scene.captions] == [scene] * 5


def test_a_caption_wrong_in_one_point_is_wrong(sample):
    for scene in sample[:100]:
        misses = list(scenes.near_misses(scene))
        assert len(misses) >= 16
        for miss in misses:
            assert not any(scenes.is_right(caption, scene) for caption in miss.captions)


def test_a_near_miss_in_an_attribute_differs_in_one_word(sample):
    for scene in sample[:100]:
        same_places = (miss for miss in scenes.near_misses(scene) if miss.layout == scene.layout)
        for miss in (miss for miss in same_places if set(miss.things) != set(scene.things)):
            words = zip(miss.captions[0].split(), scene.captions[0].split(), strict=True)
            assert sum(said != true for said, true in words) == 1


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a small red circle on a white background",
        "a small red circle at the top",
        "a small red circle at the top on a white background on a black background",
        "a small red circle at the top and a large blue square on a white background",
        "a small red circle above above a large blue square on a white background",
        "a small red circle at the top on a white background, perhaps",
        "a small small red circle at the top on a white background",
    ],
)
def test_a_caption_that_says_too_little_or_too_much_is_not_parsed(caption):
    assert scenes.parse(caption) is None


def test_the_order_of_the_parts_of_a_caption_does_not_matter():
    scene = scenes.parse("a small red circle above a large blue square on a white background")
    assert scene is not None
    assert scenes.is_right("On a white background, a large blue square below a small red circle.", scene)
    assert not scenes.is_right("on a white background, a large blue square above a small red circle", scene)


def test_a_folder_of_a_split_holds_its_images_and_their_captions(tmp_path):
    scenes.write_folder(tmp_path, "validation", 12)
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert len({row["image_id"].partition(".")[2] for row in rows}) >= 4
    for row in rows:
        with Image.open(tmp_path / row["image_id"]) as image:
            assert image.size == (scenes.CANVAS_PX, scenes.CANVAS_PX)
            assert Image.registered_extensions()[f".{row['image_id'].partition('.')[2]}"] == image.format
        assert {scenes.parse(caption).split for caption in row["captions"]} == {"validation"}


def test_the_embedded_images_are_held_out_and_of_many_formats():
    files = sorted(images_path().iterdir())
    assert len(files) == 24
    formats = set()
    for file in files:
        assert scenes.scene_at(int(file.stem.removeprefix("scene-"))).split == "test"
        with Image.open(file) as image:
            image.load()
            formats.add(image.format)
    assert formats >= {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"}


def test_the_embedded_folder_is_under_ten_megabytes():
    files = [file for folder in (bundle_path(), images_path()) for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MAX_BYTES


def test_the_paths_load_no_model_code():
    code = "import sys, captioner.demo; print(sorted({'torch', 'transformers', 'ray', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_the_embedded_bundle_names_all_of_most_held_out_scenes():
    held_out = list(scenes.examples("test", 200))
    said = embedded_captions([Image.open(io.BytesIO(example.image)).convert("RGB") for example in held_out])
    right = sum(scenes.is_right(caption, example.scene) for caption, example in zip(said, held_out, strict=True))
    assert right / len(held_out) >= 0.85


@torch.inference_mode()
def embedded_captions(images):
    """Read the bundle with transformers alone: a witness that shares no code with the package."""
    folder = bundle_path()
    clip = CLIPModel.from_pretrained(folder / "clip").eval()
    llama = LlamaForCausalLM.from_pretrained(folder / "llama").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    projector = load_file(folder / "projector.safetensors")
    pixels = CLIPImageProcessorPil.from_pretrained(folder / "clip")(images, return_tensors="pt")
    features = clip.vision_model(**pixels).pooler_output
    image = torch.nn.functional.linear(features, projector["weight"], projector["bias"])
    start = llama.get_input_embeddings()(torch.tensor(tokenizer.bos_token_id)).expand_as(image)
    embeds = torch.stack([start, image], dim=1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    end = tokenizer.eos_token_id
    ids = llama.generate(
        inputs_embeds=embeds, attention_mask=mask, do_sample=False, max_new_tokens=40, pad_token_id=end
    )
    return tokenizer.batch_decode(ids, skip_special_tokens=True)
