"""What `jobs/doctor.py` does: look whether a job could run here, one line a fact, and what to do where it could not.

Looks at this machine and at the stores that it is told of; starts no Ray, loads no model, writes nothing.
"""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from captioner import __version__
from captioner.captioning.number_format import resolved_dtype
from captioner.captioning.resources import Cluster, allocate
from captioner.config import DoctorConfig, ModelConfig, ResourceConfig
from captioner.errors import CaptionerError, InputError
from captioner.machine import memory_bytes, num_cpus
from captioner.storage import Location, open_store
from captioner.storage.faults import StoreError
from captioner.storage.local_cache import cache_folder
from captioner.terminal import counted, say

__all__ = ["doctor"]

_PACKAGES = ("ray", "torch", "transformers", "pyarrow", "duckdb", "fsspec", "s3fs")
_STORE_PACKAGES = {"gcs": "gcsfs", "azure": "adlfs"}
_LEAST_MEMORY, _LEAST_DISK = 4e9, 2e9  # of the demo; a model of eight billion parameters needs 16 GB of each
_LONGEST_FOLDER = 40  # characters: Ray's sockets have names of some 60 below it, and may have 107


class Finding(NamedTuple):
    """One fact; `is_ok` is false where no job could run."""

    name: str
    says: str
    is_ok: bool = True


def doctor(config: DoctorConfig) -> Mapping[str, Any]:
    """Look at everything, print a line of each and return them as a summary, `ok` unless something is in the way."""
    found = []
    for look in (
        _python,
        _packages,
        _device,
        _memory,
        _disks,
        _ray,
        _hub,
        lambda: _asked(config),
        lambda: _job(config),
    ):
        for finding in look():
            found.append(finding)
            say([f"{'ok' if finding.is_ok else 'PROBLEM':8}{finding.name:12}{finding.says}"])
    num_problems = sum(not finding.is_ok for finding in found)
    say([f"{counted(num_problems, 'problem')} found" if num_problems else "nothing is in the way of a job"])
    return {
        "ok": all(finding.is_ok for finding in found),
        "findings": [{"name": one.name, "ok": one.is_ok, "says": one.says} for one in found],
    }


def _python() -> Iterator[Finding]:
    yield Finding("captioner", f"{__version__}, Python {platform.python_version()}, {platform.system()}")


def _packages() -> Iterator[Finding]:
    found = {name: _version(name) for name in _PACKAGES}
    missing = [name for name, known in found.items() if not known]
    shown = ", ".join(f"{name} {known}" for name, known in found.items() if known)
    remedy = f"{', '.join(missing)} missing: pip install -c constraints.txt ." if missing else ""
    yield Finding("packages", "; ".join(filter(None, [shown, remedy])), not missing)
    stores = [f"{kind} {'yes' if _version(name) else 'no'}" for kind, name in _STORE_PACKAGES.items()]
    yield Finding("stores", f"local, http, s3, hf yes; {', '.join(stores)} (pip install '.[gcs]', '.[azure]')")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _device() -> Iterator[Finding]:
    import torch  # here, not above: what else is wrong has been said when it cannot be imported

    if not torch.cuda.is_available():
        why = "torch is built for CPUs" if torch.version.cuda is None else "no card, or no driver that fits torch"
        yield Finding("gpu", f"none: {why}. The demo runs on CPUs; a model of billions of parameters needs a GPU")
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        free, _ = torch.cuda.mem_get_info(index)
        numbers = "bfloat16" if torch.cuda.is_bf16_supported() else "float16, as it has no bfloat16"
        yield Finding(
            "gpu",
            f"{card.name}, {free / 1e9:.0f} of {card.total_memory / 1e9:.0f} GB free, CUDA {torch.version.cuda},"
            f" {numbers}",
        )


def _memory() -> Iterator[Finding]:
    total = memory_bytes()
    says = f"{total / 1e9:.1f} GB, {num_cpus()} CPUs" if total else f"unknown, {num_cpus()} CPUs"
    remedy = "" if not total or total >= _LEAST_MEMORY else f"; expected {_LEAST_MEMORY / 1e9:g} GB for the demo alone"
    yield Finding("memory", says + remedy, not remedy)


def _disks() -> Iterator[Finding]:
    for name, folder, use in (
        ("cache", cache_folder(), "CAPTIONER_CACHE; models from stores are copied here"),
        ("temporary", Path(tempfile.gettempdir()), "TMPDIR"),
    ):
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(there).free
        problem = "" if free >= _LEAST_DISK else f"; expected {_LEAST_DISK / 1e9:g} GB"
        problem += "" if os.access(there, os.W_OK) else "; it cannot be written"
        yield Finding(name, f"{folder}, {free / 1e9:.1f} GB free ({use}){problem}", not problem)


def _ray() -> Iterator[Finding]:
    if address := os.environ.get("RAY_ADDRESS"):
        yield Finding("ray", f"a job joins the cluster of RAY_ADDRESS, {address}")
        return
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    is_short = len(folder) <= _LONGEST_FOLDER
    remedy = "" if is_short else f"; {folder} is too long a name for its sockets: set RAY_TMPDIR=/tmp"
    yield Finding("ray", f"a job starts a local one{remedy}", is_short)


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    login = "logged in" if get_token() else "not logged in (hf auth login): gated models, as LLaMA-3, need it"
    offline = "; HF_HUB_OFFLINE is set: only models in its cache are found" if constants.HF_HUB_OFFLINE else ""
    yield Finding("hub", login + offline)


def _asked(config: DoctorConfig) -> Iterator[Finding]:
    """Look at what the user names."""
    for name, path in (("input", config.input_path), ("output", config.output)):
        if path and path != "demo":
            place = Location(path, config.storage_options)
            yield _checked(name, partial(_seen, place, is_new=name == "output"))
    if config.model.model:
        yield _checked("model", partial(_summary_of, config.model))


def _checked(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, look())
    except StoreError as error:
        return Finding(name, error.fault.detail, is_ok=False)
    except CaptionerError as error:
        return Finding(name, str(error), is_ok=False)


def _seen(place: Location, *, is_new: bool) -> str:
    entry = open_store(place).info(place)
    if entry is None and not is_new:
        raise InputError(f"{place} does not exist; expected a file, a folder or prefix")
    if entry is None:
        return f"{place} is new"
    return f"{place} is a {'folder' if entry.is_folder else 'file'}"


def _summary_of(model: ModelConfig) -> str:
    from captioner.captioning.plan import describe_model

    found = describe_model(model)
    return f"{found.summary}, {found.weights_bytes / 1e9:.1f} GB of weights"


def _job(config: DoctorConfig) -> Iterator[Finding]:
    """Say what a job would run with on this machine."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allocation = allocate(ResourceConfig(), Cluster(cpus=num_cpus(), gpus=gpus))
    high = allocation.workers[1]
    where = counted(gpus, "GPU") if gpus else "CPUs"
    yield Finding(
        "a job here",
        f"{counted(high, 'model worker')} on {where}, {counted(allocation.decoders[1], 'decoder')},"
        f" {resolved_dtype(config.model, gpus)}",
    )
