"""Captions as token ids, cached: made once by the process that starts a fit, memory-mapped by each of its workers.

    RUN/tokens/<split>-<digest>.arrow    one row a caption: `image`, its position in the split, and `tokens`

The digest is that of everything the ids depend on: tokenizer, template, length, examples. A file of anything else has
another name, so a file that exists is valid. On a store the file is copied once a machine. Knows no model and no Ray.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from captioner.config import TrainingConfig
from captioner.errors import JobError
from captioner.model.language.language import LanguageSource
from captioner.storage import Store, open_store
from captioner.storage.local_cache import MONTH_S, make_once
from captioner.storage.urls import absolute, join, local_path, name, scheme
from captioner.training.features.examples import FeatureSet
from captioner.training.fit.batches import Images, TokenizedSplit
from captioner.training.fit.fit_output import FitOutput
from captioner.training.fit.projector import end_token_id

__all__ = ["CaptionTokens", "tokenize_examples"]

log = logging.getLogger("captioner")

_FORMAT = 1
_SCHEMA = pa.schema([pa.field("image", pa.int64()), pa.field("tokens", pa.large_list(pa.int32()))])
_MAGIC = b"ARROW1\0\0"
_COPY_BYTES = 32 << 20


@dataclass(frozen=True)
class CaptionTokens:
    """The token ids of a fit's captions, all made; small, can be pickled."""

    folder: str
    storage_options: Mapping[str, Any] = field(repr=False)
    fingerprint: str
    """Hex digest of everything they depend on."""

    def url(self, split: str) -> str:
        """Return the URL of the file of a split."""
        return join(self.folder, f"{split}-{self.fingerprint}.arrow")

    def load(self, split: str, images: Images) -> TokenizedSplit:
        """Return the captions of a split, mapped, beside its images.

        Raises JobError for a damaged file, StoreError."""
        path = self._on_disk(split)
        try:
            rows = _first_batch(path)
        except (pa.ArrowException, OSError, EOFError, ValueError) as error:
            raise JobError(
                f"{path} cannot be read: {error}; remove it, and the captions are tokenized again"
            ) from error
        tokens = rows["tokens"]
        return TokenizedSplit(images, rows["image"].to_numpy(), tokens.values.to_numpy(), tokens.offsets.to_numpy())

    def write(self, split: str, captions: TokenizedSplit) -> None:
        """Write the file of a split. Raises StoreError."""
        tokens = pa.LargeListArray.from_arrays(pa.array(captions.starts), pa.array(captions.tokens))
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_file(buffer, _SCHEMA) as file:
            file.write_batch(pa.record_batch([pa.array(captions.image), tokens], _SCHEMA))
        self._store.write_atomic(self.url(split), bytes(buffer.getvalue()))

    def has(self, split: str) -> bool:
        """Return whether a split has its file. Raises StoreError."""
        return self._store.info(self.url(split)) is not None

    @property
    def _store(self) -> Store:
        return open_store(self.folder, self.storage_options)

    def _on_disk(self, split: str) -> Path:
        url = self.url(split)
        if scheme(url) == "file":
            return Path(local_path(url))
        return make_once("tokens", name(url), lambda partial: self._fetch(url, partial), keep_s=MONTH_S)

    def _fetch(self, url: str, target: Path) -> None:
        with self._store.open(url) as remote, target.open("wb") as file:
            shutil.copyfileobj(remote, file, _COPY_BYTES)


def _first_batch(path: Path) -> pa.RecordBatch:
    """Return the batch of a file, mapped. Its own schema is not read: it could name types that run code."""
    with pa.memory_map(str(path)) as file:
        file.seek(len(_MAGIC))
        schema, batch = (pa.ipc.read_message(file) for _ in range(2))
    if (schema.type, batch.type) != ("schema", "record batch"):
        raise ValueError(f"it begins with {schema.type} and {batch.type}")
    rows = pa.ipc.read_record_batch(batch, _SCHEMA)
    rows.validate(full=True)
    return rows


def tokenize_examples(
    features: FeatureSet,
    llama: LanguageSource,
    template: str,
    training: TrainingConfig,
    output: FitOutput,
) -> CaptionTokens:
    """Return the token ids of all training captions and of the validation sample; those that have no file are made.

    Raises StoreError."""
    end = end_token_id(llama.tokenizer, template, llama.eos_token_ids)
    lengths = (training.max_caption_tokens, training.num_measured_images)
    named = hashlib.blake2b(repr((_FORMAT, template, end, lengths, features.fingerprint)).encode(), digest_size=12)
    named.update(llama.tokenizer.backend_tokenizer.to_str().encode())
    found = CaptionTokens(join(absolute(output.run_folder), "tokens"), output.storage_options, named.hexdigest())
    missing = [split for split in ("train", "validation") if not found.has(split)]
    for split in missing:
        examples = features.validation_sample(training) if split == "validation" else features.load(split)
        log.info("tokenizing split=%s captions=%d", split, sum(map(len, examples.captions)))
        options = {"end_token_id": end, "max_tokens": training.max_caption_tokens}
        found.write(split, TokenizedSplit.tokenize(examples.features, examples.captions, llama.tokenizer, **options))
    return found
