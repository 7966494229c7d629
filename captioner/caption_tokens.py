"""Captions as token ids, kept: made once by the process that starts a fit, memory-mapped by each of its workers.

    RUN/tokens/<split>-<digest>.arrow    one row a caption: `image`, its place in the split, and `tokens`

The digest is of all that the ids follow from: tokenizer, template, length, examples. A file of anything else has
another name, so what is there is valid. On a store the file is copied once a machine. Knows no model and no Ray.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from captioner.config import TrainingConfig
from captioner.errors import JobError
from captioner.examples import FeatureSet, local_copy
from captioner.fitting.batches import TokenizedSplit
from captioner.fitting.output import FitOutput
from captioner.fitting.projector import end_token_id
from captioner.model.llama import LlamaSource
from captioner.sources.store import Store, open_store
from captioner.sources.urls import absolute, join, local_path, name, scheme

__all__ = ["CaptionTokens", "tokenize_examples"]

log = logging.getLogger("captioner")

_FORMAT = 1
_SCHEMA = pa.schema([pa.field("image", pa.int64()), pa.field("tokens", pa.large_list(pa.int32()))])
_COPIED_BYTES = 32 << 20


@dataclass(frozen=True)
class CaptionTokens:
    """The token ids of a fit's captions, all made; small, can be pickled."""

    folder: str
    storage_options: Mapping[str, Any] = field(repr=False)
    fingerprint: str
    """Hex digest of what they follow from."""

    def url(self, split: str) -> str:
        """Return where those of a split are."""
        return join(self.folder, f"{split}-{self.fingerprint}.arrow")

    def load(self, split: str, features: npt.NDArray[np.float16]) -> TokenizedSplit:
        """Return the captions of a split, mapped, beside its images' float16[N, F].

        Raises JobError for a damaged file, StoreError."""
        path = self._on_disk(split)
        try:
            with pa.memory_map(str(path)) as file:
                rows = pa.ipc.open_file(file).get_batch(0)
        except pa.ArrowInvalid as error:
            raise JobError(f"{path} cannot be read: {error}; remove it, and the captions are tokenized anew") from error
        tokens = rows["tokens"]
        return TokenizedSplit(features, rows["image"].to_numpy(), tokens.values.to_numpy(), tokens.offsets.to_numpy())

    def write(self, split: str, captions: TokenizedSplit) -> None:
        """Keep the captions of a split. Raises StoreError."""
        tokens = pa.LargeListArray.from_arrays(pa.array(captions.starts), pa.array(captions.tokens))
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_file(buffer, _SCHEMA) as file:
            file.write_batch(pa.record_batch([pa.array(captions.image), tokens], _SCHEMA))
        self._store.write_atomic(self.url(split), bytes(buffer.getvalue()))

    def has(self, split: str) -> bool:
        """Say whether those of a split are there. Raises StoreError."""
        return self._store.info(self.url(split)) is not None

    @property
    def _store(self) -> Store:
        return open_store(self.folder, self.storage_options)

    def _on_disk(self, split: str) -> Path:
        url = self.url(split)
        if scheme(url) == "file":
            return Path(local_path(url))
        return local_copy("tokens", name(url), lambda arriving: self._fetch(url, arriving))

    def _fetch(self, url: str, target: Path) -> None:
        with self._store.open(url) as remote, target.open("wb") as file:
            shutil.copyfileobj(remote, file, _COPIED_BYTES)


def tokenize_examples(
    features: FeatureSet,
    llama: LlamaSource,
    template: str,
    training: TrainingConfig,
    output: FitOutput,
) -> CaptionTokens:
    """Return the token ids of all captions to learn, and of the validation images to measure on, made where there are
    none. Raises StoreError."""
    end = end_token_id(llama.tokenizer, template, llama.eos_token_ids)
    lengths = (training.max_caption_tokens, training.num_measured_images)
    named = hashlib.blake2b(repr((_FORMAT, template, end, lengths, features.fingerprint)).encode(), digest_size=12)
    named.update(llama.tokenizer.backend_tokenizer.to_str().encode())
    found = CaptionTokens(join(absolute(output.run_folder), "tokens"), output.storage_options, named.hexdigest())
    missing = [split for split in ("train", "validation") if not found.has(split)]
    for split in missing:
        examples = features.measured(training) if split == "validation" else features.load(split)
        log.info("tokenizing split=%s captions=%d", split, sum(map(len, examples.captions)))
        options = {"end_token_id": end, "max_tokens": training.max_caption_tokens}
        found.write(split, TokenizedSplit.tokenize(examples.features, examples.captions, llama.tokenizer, **options))
    return found
