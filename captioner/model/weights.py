"""Tensors in safetensors files: their headers, their fingerprint, and how they are loaded into a module.

Knows names, shapes and bytes; nothing of CLIP or LLaMA. Only headers are read until `load_into`. Pickles are never
opened.
"""

import hashlib
import math
import operator
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from captioner.errors import BundleError, ShapeError
from captioner.model.folder import Folder
from captioner.model.shapes import Shapes
from captioner.storage.json_text import parse_object
from captioner.storage.urls import is_inside

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Stored", "Weights", "read_weights"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_WHOLE_BYTES = 64 << 20
_BLOCK_BYTES = 4096
_READERS = 16
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # computed from the config; old checkpoints store them as well


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its name there, and bytes `start` to `end` of the file."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Weights:
    """The tensors of a model by their names in its module."""

    folder: Folder
    tensors: dict[str, Stored]

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    def select(self, rename: Callable[[str], str | None]) -> "Weights":
        """Return the tensors for which `rename` returns a name, under that name."""
        named = ((rename(name), tensor) for name, tensor in self.tensors.items())
        return replace(self, tensors={name: tensor for name, tensor in named if name is not None})

    def fingerprint(self) -> str:
        """Return a hex digest of names, dtypes, shapes and values, the same however the tensors are spread over files.

        Up to 64 MiB every byte counts; beyond, of each tensor the first, middle and last 4 KiB. Any retraining changes
        those; a single number edited elsewhere in a large tensor is not noticed.
        """
        lines = [
            (name, tensor.dtype, tensor.shape, content)
            for (name, tensor), content in zip(self.tensors.items(), self._contents(), strict=True)
        ]
        return hashlib.sha256(repr(sorted(lines)).encode()).hexdigest()

    def check_fits(self, wanted: Shapes, of: str, *, optional: frozenset[str] = frozenset()) -> None:
        """Raise BundleError unless the tensors are exactly these; `optional` ones may be missing. of: their module."""
        what = f"the weights in {self.folder.name} do not fit {of}"
        missing = wanted.keys() - self.tensors.keys() - optional
        if missing:
            raise BundleError(f"{what} as its config describes it: missing {_some(missing)}")
        unexpected = self.tensors.keys() - wanted.keys()
        if unexpected:
            raise BundleError(f"{what} as its config describes it: no place for {_some(unexpected)}")
        for name, tensor in self.tensors.items():
            if tensor.shape != wanted[name]:
                raise ShapeError(f"{what}: {name} is {list(tensor.shape)}, its config says {list(wanted[name])}")

    def load_into(self, module: "nn.Module") -> None:
        """Copy each tensor that the module has from the local file to the module's device and dtype, one at a time."""
        import torch  # here, not above: a description needs none
        from safetensors import safe_open

        targets = module.state_dict(keep_vars=True)
        files = defaultdict(list)
        for name, tensor in self.tensors.items():
            if name in targets:
                files[tensor.file].append((name, tensor.name))
        device = next(iter(targets.values())).device
        for file, names in files.items():
            with safe_open(f"{self.folder.path}/{file}", framework="pt", device=str(device)) as stored, torch.no_grad():
                for name, stored_name in names:
                    targets[name].copy_(stored.get_tensor(stored_name))

    def tensor(self, name: str) -> "Tensor":
        """Return one tensor on the CPU, as it is stored, from any store."""
        import torch

        found = self.tensors[name]
        data = bytearray(self.folder.read(found.file, found.start, found.end))
        flat = torch.frombuffer(data, dtype=getattr(torch, _TORCH_NAMES[found.dtype])) if data else torch.empty(0)
        return flat.view(found.shape)

    def _contents(self) -> list[str]:
        spans: dict[str, tuple[int, int]] = {}
        for tensor in self.tensors.values():
            start, end = spans.get(tensor.file, (tensor.start, tensor.end))
            spans[tensor.file] = min(start, tensor.start), max(end, tensor.end)
        if max(self.size_bytes, sum(end - start for start, end in spans.values())) > _WHOLE_BYTES:
            with ThreadPoolExecutor(_READERS) as readers:
                return list(readers.map(self._content, self.tensors.values()))
        # an adapter has hundreds of tensors, each of which would be a request
        whole = {file: memoryview(self.folder.read(file, *span)) for file, span in spans.items()}
        return [
            hashlib.sha256(whole[tensor.file][tensor.start - origin : tensor.end - origin]).hexdigest()
            for tensor in self.tensors.values()
            for origin in [spans[tensor.file][0]]
        ]

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
        if leaving := [shard for shard in shards if not is_inside(shard)]:
            raise BundleError(f"{folder.name}/{_INDEX} names the file {leaving[0]!r}; expected files inside the folder")
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
        header = parse_object(folder.read(file, 8, 8 + length))
    except ValueError as error:
        raise BundleError(f"{where} is not a safetensors file: {error}") from error
    try:
        tensors = _tensors(header, file, origin=8 + length)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{where} has a header that is not safetensors': {error!r}; copy it again") from error
    _check_file(where, size, tensors)
    return tensors


def _tensors(header: dict[str, Any], file: str, origin: int) -> dict[str, Stored]:
    """Return what a header says of each tensor. Raises KeyError or TypeError for one that says something else."""
    found: dict[str, Stored] = {}
    for name, tensor in header.items():
        if name != "__metadata__" and not name.endswith(_BUFFERS):
            start, end = map(operator.index, tensor["data_offsets"])
            shape = tuple(map(operator.index, tensor["shape"]))
            found[name] = Stored(file, name, str(tensor["dtype"]), shape, origin + start, origin + end)
    return found


def _check_file(where: str, size: int, tensors: dict[str, Stored]) -> None:
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise BundleError(f"{where} is cut: it has {size} bytes of {end}; copy it again")
    for tensor in tensors.values():
        if tensor.dtype not in _TORCH_NAMES:
            raise BundleError(
                f"{where}: {tensor.name} is stored as {tensor.dtype}; expected one of {', '.join(_TORCH_NAMES)} "
                "(quantized checkpoints are not supported: use the original)"
            )


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
