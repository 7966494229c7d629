"""Tensors in safetensors files: their headers, their identity, and how they reach a module.

Knows names, shapes and bytes; nothing of CLIP or LLaMA. Only headers are read until `load_into`. Pickles are never
opened.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from captioner.errors import BundleError, ShapeError
from captioner.model.folder import Folder

__all__ = ["Stored", "Weights", "read_weights"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_WHOLE_BYTES = 64 << 20
_BLOCK_BYTES = 4096
_READERS = 16
_DTYPES = ("F64", "F32", "F16", "BF16")
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # computed from the config; old checkpoints store them all the same


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: what it is called there, and bytes `start` to `end` of the file."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by the name that its module gives them."""

    folder: Folder
    tensors: dict[str, Stored]

    @property
    def num_parameters(self) -> int:
        """How many numbers there are in all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    def select(self, rename: Callable[[str], str | None]) -> "Weights":
        """Return the tensors that `rename` gives a name, under that name."""
        named = ((rename(name), tensor) for name, tensor in self.tensors.items())
        return replace(self, tensors={name: tensor for name, tensor in named if name is not None})

    def fingerprint(self) -> str:
        """Return a hex digest of names, dtypes, shapes and values, the same however the tensors are spread over files.

        Up to 64 MiB every byte counts; beyond, of each tensor the first, middle and last 4 KiB. Any retraining changes
        those; a single number edited elsewhere in a large tensor goes unseen.
        """
        with ThreadPoolExecutor(_READERS) as readers:
            contents = readers.map(self._content, self.tensors.values())
            lines = [
                (name, tensor.dtype, tensor.shape, content)
                for (name, tensor), content in zip(self.tensors.items(), contents, strict=True)
            ]
        return hashlib.sha256(repr(sorted(lines)).encode()).hexdigest()

    def check_fits(self, module: nn.Module, *, optional: frozenset[str] = frozenset()) -> None:
        """Raise BundleError unless the tensors are exactly those of the module; `optional` ones may be missing.

        module: on any device, meta as well.
        """
        wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        what = f"the weights in {self.folder.name} do not fit {type(module).__name__}"
        missing = wanted.keys() - self.tensors.keys() - optional
        if missing:
            raise BundleError(f"{what} as its config describes it: missing {_some(missing)}")
        unexpected = self.tensors.keys() - wanted.keys()
        if unexpected:
            raise BundleError(f"{what} as its config describes it: no place for {_some(unexpected)}")
        for name, tensor in self.tensors.items():
            if tensor.shape != wanted[name]:
                raise ShapeError(f"{what}: {name} is {list(tensor.shape)}, its config says {list(wanted[name])}")

    @torch.no_grad()
    def load_into(self, module: nn.Module) -> None:
        """Copy each tensor that the module has from the local file to the module's device and dtype, one at a time."""
        targets = module.state_dict(keep_vars=True)
        files = defaultdict(list)
        for name, tensor in self.tensors.items():
            if name in targets:
                files[tensor.file].append((name, tensor.name))
        device = next(iter(targets.values())).device
        for file, names in files.items():
            with safe_open(f"{self.folder.path}/{file}", framework="pt", device=str(device)) as stored:
                for name, stored_name in names:
                    targets[name].copy_(stored.get_tensor(stored_name))

    def _content(self, tensor: Stored) -> str:
        if self.size_bytes <= _WHOLE_BYTES:
            return hashlib.sha256(self.folder.read(tensor.file, tensor.start, tensor.end)).hexdigest()
        middle = (tensor.start + tensor.end) // 2
        blocks = [
            self.folder.read(tensor.file, start, min(start + _BLOCK_BYTES, tensor.end))
            for start in (tensor.start, middle, max(tensor.end - _BLOCK_BYTES, tensor.start))
        ]
        return hashlib.sha256(b"".join(blocks)).hexdigest()


def read_weights(folder: Folder, file: str | None = None) -> Weights:
    """Return the tensors of a folder from the headers of its safetensors file, shards, or the one `file`.

    Raises BundleError if there are none, a shard is missing, a file is cut, or the weights are quantized.
    """
    tensors: dict[str, Stored] = {}
    for name in [file] if file else _files(folder):
        tensors |= _read_header(folder, name)
    return Weights(folder, tensors)


def _files(folder: Folder) -> list[str]:
    if folder.has(_INDEX):
        shards = sorted(set(folder.read_json(_INDEX)["weight_map"].values()))
        missing = [shard for shard in shards if not folder.has(shard)]
        if missing:
            raise BundleError(
                f"{folder.name}/{_INDEX} names {len(shards)} files, of which {_some(set(missing))} is not there; "
                "copy the folder again"
            )
        return shards
    if folder.has(_SINGLE):
        return [_SINGLE]
    remedy = "expected model.safetensors, or model.safetensors.index.json and its shards"
    if folder.has("pytorch_model.bin") or folder.has("pytorch_model.bin.index.json"):
        remedy = (
            "only pytorch_model.bin, a pickle, which is never opened; convert it once: load the model with "
            "transformers and call save_pretrained(folder)"
        )
    raise BundleError(f"{folder.name} has no safetensors weights: {remedy}")


def _read_header(folder: Folder, file: str) -> dict[str, Stored]:
    where = f"{folder.name}/{file}"
    size = folder.size_bytes(file)
    length = int.from_bytes(folder.read(file, 0, 8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
        raise BundleError(f"{where} is not a safetensors file, or is cut ({size} bytes); copy it again")
    try:
        header: dict[str, Any] = json.loads(folder.read(file, 8, 8 + length))
    except ValueError as error:
        raise BundleError(f"{where} is not a safetensors file: {error}") from error
    header.pop("__metadata__", None)
    origin = 8 + length
    tensors = {
        name: Stored(file, name, tensor["dtype"], tuple(tensor["shape"]), *(origin + o for o in tensor["data_offsets"]))
        for name, tensor in header.items()
        if not name.endswith(_BUFFERS)
    }
    _check_file(where, size, tensors)
    return tensors


def _check_file(where: str, size: int, tensors: dict[str, Stored]) -> None:
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise BundleError(f"{where} is cut: it has {size} bytes of {end}; copy it again")
    for tensor in tensors.values():
        if tensor.dtype not in _DTYPES:
            raise BundleError(
                f"{where}: {tensor.name} is stored as {tensor.dtype}; expected one of {', '.join(_DTYPES)} "
                "(quantized checkpoints are not supported: use the original)"
            )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
