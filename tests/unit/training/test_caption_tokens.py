"""Captions as token ids: made once for all workers of a fit, mapped by each, and made again when they would differ."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from captioner.config import TrainingConfig
from captioner.errors import JobError
from captioner.model.folder import open_folder
from captioner.model.language.language import LanguageSource
from captioner.model.language.table import read_language
from captioner.model.tokenizer import Tokenizer
from captioner.training.features import caption_tokens
from captioner.training.features.caption_tokens import CaptionTokens, tokenize_examples
from captioner.training.features.examples import Examples
from captioner.training.fit.batches import TokenizedSplit
from captioner.training.fit.fit_output import FitOutput
from captioner.training.fit.fit_worker import FitTask, run_fit_worker
from captioner.training.fit.projector import end_token_id
from tests.conftest import Bucket
from tests.unit.model import tiny_models
from tests.unit.training import fitting_models as toys

TRAINING = replace(toys.config(), max_steps=4, num_measured_images=8, max_caption_tokens=6)


class ToyFeatures:
    """What `FeatureSet` is to a fit, at random; records its calls."""

    fingerprint = "of toys"

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load(self, split: str) -> Examples:
        self.loaded.append(split)
        texts = toys.captions(toys.NUM_TRAIN, seed=len(split))
        return Examples([f"{split}-{n}" for n in range(len(texts))], self.features_of(split), texts)

    def features_of(self, split: str) -> np.ndarray:
        return toys.features(toys.NUM_TRAIN, seed=len(split))

    def validation_sample(self, training: TrainingConfig) -> Examples:
        return self.load("validation").sample(training.num_measured_images)


@pytest.fixture(autouse=True)
def local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAPTIONER_CACHE", str(tmp_path / "local"))
    return tmp_path / "local" / "tokens"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toys.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llama(model: str) -> LanguageSource:
    return read_language(open_folder(f"{model}/llama"), template=toys.TEMPLATE)


def made(
    llama: LanguageSource,
    output: FitOutput,
    training: TrainingConfig = TRAINING,
    template: str = toys.TEMPLATE,
    features: Any = None,
) -> CaptionTokens:
    return tokenize_examples(features or ToyFeatures(), llama, template, training, output)


def expected(llama: LanguageSource, examples: Examples) -> TokenizedSplit:
    end = end_token_id(llama.tokenizer, toys.TEMPLATE, llama.eos_token_ids)
    settings = {"end_token_id": end, "max_tokens": TRAINING.max_caption_tokens}
    return TokenizedSplit.tokenize(examples.features, examples.captions, llama.tokenizer, **settings)


def assert_same(found: TokenizedSplit, wanted: TokenizedSplit) -> None:
    for name in ("images", "image", "tokens", "starts"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name)), name
        assert getattr(found, name).dtype == getattr(wanted, name).dtype


def test_what_a_worker_maps_is_what_the_tokenizer_says(tmp_path: Path, llama: LanguageSource) -> None:
    tokens, features = made(llama, FitOutput(str(tmp_path))), ToyFeatures()
    assert_same(tokens.load("train", features.features_of("train")), expected(llama, features.load("train")))
    measured = features.validation_sample(TRAINING)
    assert_same(tokens.load("validation", measured.features), expected(llama, measured))


def test_the_arrays_are_mapped_and_not_to_be_written_to(tmp_path: Path, llama: LanguageSource) -> None:
    tokens = made(llama, FitOutput(str(tmp_path)))
    split = tokens.load("train", ToyFeatures().features_of("train"))
    assert not any(
        values.flags.writeable or values.flags.owndata for values in (split.image, split.tokens, split.starts)
    )
    assert tokens.url("train") in mapped_files(), "the file is mapped, not read"


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def test_a_worker_tokenizes_nothing_and_reads_no_caption_to_learn(
    tmp_path: Path, model: str, llama: LanguageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, features = FitOutput(str(tmp_path)), ToyFeatures()
    copy_start(Path(model), output)
    tokens = made(llama, output, features=features)
    assert features.loaded == ["train", "validation"]
    features.loaded.clear()
    calls: list[object] = []
    for kind in (Tokenizer, transformers.PreTrainedTokenizerFast):
        monkeypatch.setattr(kind, "__call__", lambda _self, texts, **_: counted(calls, texts))
    task = pickle.loads(pickle.dumps(FitTask(output, features, tokens, TRAINING, "auto", "cpu", 1)))  # type: ignore[arg-type]
    state = run_fit_worker(task, "cpu", lambda _row: None)
    assert state.step == 4
    assert task.features.loaded == ["validation"], "captions are read as references alone"
    assert calls == ["<|begin_of_text|>Look: ", " It shows "], "of texts the template alone"


def counted(calls: list[object], texts: Any) -> Any:
    calls.append(texts)
    return tiny_models.llama3_tokenizer()._encode_plus(texts, add_special_tokens=False)


def copy_start(model: Path, output: FitOutput) -> None:
    for file in model.rglob("*"):
        if file.is_file():
            output.write(f"start/{file.relative_to(model)}", file.read_bytes())


def test_they_are_made_once_and_found_again(tmp_path: Path, llama: LanguageSource) -> None:
    output, again = FitOutput(str(tmp_path)), ToyFeatures()
    assert made(llama, output).fingerprint == made(llama, output, features=again).fingerprint
    assert again.loaded == []


def other_tokenizer(llama: LanguageSource) -> LanguageSource:
    return replace(llama, tokenizer=tiny_models.llama3_tokenizer(extra=("[OTHER]",)))


class OtherExamples(ToyFeatures):
    fingerprint = "of others"


@pytest.mark.parametrize(
    "changed",
    [
        lambda llama, output, features: made(other_tokenizer(llama), output, features=features),
        lambda llama, output, features: made(llama, output, template="<|begin_of_text|>{image}", features=features),
        lambda llama, output, features: made(llama, output, replace(TRAINING, max_caption_tokens=5), features=features),
        lambda llama, output, features: made(
            llama, output, replace(TRAINING, num_measured_images=7), features=features
        ),
    ],
    ids=["tokenizer", "template", "length", "measured images"],
)
def test_another_setting_makes_them_again(tmp_path: Path, llama: LanguageSource, changed: Any) -> None:
    output, again = FitOutput(str(tmp_path)), ToyFeatures()
    before = made(llama, output)
    assert changed(llama, output, again).fingerprint != before.fingerprint
    assert again.loaded == ["train", "validation"]


def test_other_examples_are_tokenized_again(tmp_path: Path, llama: LanguageSource) -> None:
    output, again = FitOutput(str(tmp_path)), OtherExamples()
    made(llama, output)
    made(llama, output, features=again)
    assert again.loaded == ["train", "validation"]


def test_a_run_folder_on_a_store_is_copied_once_a_machine(s3: Bucket, llama: LanguageSource, local_cache: Path) -> None:
    features = ToyFeatures()
    tokens = pickle.loads(pickle.dumps(made(llama, FitOutput(f"{s3.url}/bundle", s3.storage_options))))
    first = tokens.load("train", features.features_of("train"))
    assert_same(first, expected(llama, features.load("train")))
    [copy] = local_cache.glob("*.arrow")
    s3.fs.rm(tokens.url("train"))
    assert_same(tokens.load("train", first.images), first)
    assert str(copy) in mapped_files()


def test_a_damaged_file_is_named(tmp_path: Path, llama: LanguageSource) -> None:
    tokens, features = made(llama, FitOutput(str(tmp_path))), ToyFeatures().features_of("train")
    whole = Path(tokens.url("train")).read_bytes()
    Path(tokens.url("train")).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        JobError, match=r"train-\w+\.arrow cannot be read: .*; remove it, and the captions are tokenized"
    ):
        tokens.load("train", features)


def test_a_split_without_images_has_no_captions(tmp_path: Path, llama: LanguageSource) -> None:
    class Trained(ToyFeatures):
        def validation_sample(self, training: TrainingConfig) -> Examples:
            return Examples([], np.empty((0, tiny_models.CLIP_WIDTH), np.float16), [])

    tokens = made(llama, FitOutput(str(tmp_path)), features=Trained())
    assert len(tokens.load("validation", np.empty((0, tiny_models.CLIP_WIDTH), np.float16))) == 0


def test_the_log_says_how_many_captions_there_are(
    tmp_path: Path, llama: LanguageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(caption_tokens.log, "info", lambda text, *values: lines.append(text % values))
    features = ToyFeatures()
    made(llama, FitOutput(str(tmp_path)), features=features)
    num_captions = sum(map(len, features.load("train").captions))
    assert lines[0] == f"tokenizing split=train captions={num_captions}"
