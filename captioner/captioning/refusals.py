"""What a caption job refuses, or warns of, that no flag shows alone: places that overlap, a device that is missing.

Knows the resolved job and looks at its stores; reads no image. Each message names the value, what was expected and what
to do.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from captioner.captioning.job import DEMO_MODEL, Job
from captioner.errors import ConfigError, InputError, OutputError
from captioner.inputs import Columns, is_image_name
from captioner.machine import may_have_gpu
from captioner.storage import Location
from captioner.storage.faults import StoreError
from captioner.tables import CaptionTable, table_around
from captioner.terminal import command

__all__ = [
    "check_columns_are_kept",
    "check_device",
    "check_list_options",
    "check_model_is_named",
    "check_places",
    "warnings",
]

_WEB = ("http://", "https://")
_LOGINS = frozenset({"headers", "auth", "cookies", "cookie_jar"})
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_SWAPPED = "INPUT comes first, then OUTPUT: were they swapped?"


def check_model_is_named(job: Job) -> None:
    """Raise ConfigError where other images than the demo's are to be captioned by no model in particular."""
    if not job.config.model.model:
        raise ConfigError(
            f"--model is missing; expected a bundle or a LLaVA checkpoint to caption {job.images} with, such as --model"
            f" xtuner/llava-llama-3-8b-v1_1-transformers. --model demo tries the machinery alone: {DEMO_MODEL}"
        )


def check_device(device: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError for a CUDA device on a machine without one, unless the job runs on a cluster."""
    if device.startswith("cuda") and not environment.get("RAY_ADDRESS") and not may_have_gpu(environment):
        raise ConfigError(
            f"--device is {device}, but this machine has no GPU, or CUDA_VISIBLE_DEVICES hides it; expected auto or cpu"
        )


def check_places(job: Job, table: CaptionTable) -> None:
    """Raise for images and a new table in places that cannot be what was meant.

    InputError where the input is a caption table, OutputError where the output lies among the images or among files of
    something else."""
    where, images = _path(table.location), _path(job.images)
    foreign = _foreign(table)
    hint = f". {_SWAPPED}" if any(map(is_image_name, foreign)) else ""
    if found := _table_of(job.images):
        raise InputError(
            f"INPUT {job.images} is a caption table, or part of one; expected images. To look into it:"
            f" {command('query', str(found))}{hint}"
        )
    if where == images:
        raise OutputError(f"OUTPUT {table.location} is INPUT; expected a folder of its own, beside the images")
    if where.startswith(images.rstrip("/") + "/"):
        raise OutputError(
            f"OUTPUT {table.location} lies in INPUT {job.images}, which --refresh would list with it; expected a folder"
            " outside, such as one beside it"
        )
    if foreign:
        raise OutputError(
            f"OUTPUT {table.location} holds {len(foreign):,} files or folders of something else, such as {foreign[0]};"
            f" expected a new or empty folder, or the OUTPUT of an earlier run, such as {table.location / 'captions'}"
            f"{hint}"
        )


def _table_of(images: Location) -> Location | None:
    if str(images).startswith(_WEB):  # a server may have a page under any name
        return None
    with suppress(StoreError):  # the listing that follows says it of the input
        return table_around(images)
    return None


def _path(location: Location) -> str:
    return os.path.realpath(location.local_path) if location.is_local else str(location)


def _foreign(table: CaptionTable) -> list[str]:
    """Return what lies in the folder of a table and is none of its own; hidden files are no one's."""
    return [name for name in table.other_names() if not name.startswith(".")]


def check_list_options(job: Job, kind: str) -> None:
    """Raise ConfigError for a local list with credentials that could go to any web server that it names."""
    options = job.images.storage_options
    client = options.get("client_kwargs")
    given = sorted(_LOGINS & {*options, *(client if isinstance(client, Mapping) else ())})
    if kind == "list" and job.images.is_local and given:
        raise ConfigError(
            f"--storage-options has {', '.join(given)}, which would go to every server that {job.images} names;"
            " expected none with a local list. Put the list on that server, or use URLs that hold what they need, as"
            " presigned ones do"
        )


def check_columns_are_kept(job: Job, columns: Columns) -> None:
    """Raise ConfigError for a prompt that is added to a table and names a column that the table does not keep."""
    if missing := [name for name in job.config.input.kept_columns.values() if name not in columns.kept_from]:
        kept = ", ".join(columns.kept_from) or "none"
        raise ConfigError(
            f"--prompts names the column {missing[0]}, which {job.output} does not keep; expected a prompt that is"
            f" added to it to name a column that it keeps ({kept}). Choose another OUTPUT to ask with {missing[0]}"
        )


def warnings(job: Job, kind: str, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """Yield what a person should know before the job runs."""
    if job.is_demo_model_elsewhere:
        yield DEMO_MODEL
    proxies = [name for name in (*_PROXIES, *map(str.upper, _PROXIES)) if environment.get(name)]
    if proxies and (kind == "list" or str(job.images).startswith(_WEB)) and not _uses_proxy(job.images.storage_options):
        option = """--storage-options '{"client_kwargs": {"trust_env": true}}'"""
        yield f"{proxies[0]} is set and not used for images: {option} uses it"


def _uses_proxy(options: Mapping[str, Any]) -> bool:
    client = options.get("client_kwargs")
    return "proxy" in options or (isinstance(client, Mapping) and ("trust_env" in client or "proxy" in client))
