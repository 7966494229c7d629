"""Model folders on the Hugging Face hub: found in the local cache, or read in place and downloaded when loaded.

Knows hub ids and nothing of what a model is. `HF_HUB_OFFLINE`, `HF_HUB_CACHE`, `HF_ENDPOINT` and `HF_TOKEN` work as
everywhere. Never downloads pickles.
"""

import json
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem
from huggingface_hub import HfApi, HfFileSystem, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from captioner.errors import BundleError

__all__ = ["MODEL_FILES", "download", "find", "is_hub"]

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""What is fetched of a model folder: no pickles, no weights of other frameworks."""


def find(hub_id: str) -> tuple[AbstractFileSystem, str]:
    """Return store and path of `org/name[@revision]`: the cached snapshot if it is whole, else the hub itself.

    Raises BundleError if it is neither cached nor reachable, does not exist, or is gated.
    """
    repo, _, revision = hub_id.partition("@")
    cached = _cached(repo, revision or None)
    if cached is not None and _is_whole(cached):
        return fsspec.filesystem("file"), str(cached)
    if constants.HF_HUB_OFFLINE:
        state = "only in part" if cached is not None else "not"
        raise BundleError(
            f"{hub_id} is {state} in the hub cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set; {_remedy(repo)}"
        )
    return HfFileSystem(), f"{repo}@{_commit(hub_id, repo, revision or None)}"


def is_hub(fs: AbstractFileSystem) -> bool:
    """Whether a store is the hub."""
    return isinstance(fs, HfFileSystem)


def download(path: str, name: str) -> Path:
    """Return the local folder of the hub path `org/name@commit` after fetching what is missing of it."""
    repo, _, commit = path.partition("@")
    try:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=MODEL_FILES))
    except (OSError, HfHubHTTPError) as error:
        raise BundleError(f"cannot download {name}: {error}; {_remedy(repo)}") from error


def _cached(repo: str, revision: str | None) -> Path | None:
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _is_whole(snapshot: Path) -> bool:
    """Whether a snapshot has its config and every shard, as an interrupted download does not."""
    if not (snapshot / "config.json").exists():
        return False
    index = snapshot / "model.safetensors.index.json"
    if not index.exists():
        return any(snapshot.glob("*.safetensors")) or any(snapshot.glob("*.bin"))
    shards = set(json.loads(index.read_text())["weight_map"].values())
    return all((snapshot / shard).exists() for shard in shards)


def _commit(hub_id: str, repo: str, revision: str | None) -> str:
    api = HfApi()
    try:
        api.auth_check(repo)
        return str(api.model_info(repo, revision=revision).sha)
    except GatedRepoError as error:
        raise BundleError(
            f"{repo} is gated: accept its licence at {constants.ENDPOINT}/{repo}, then `hf auth login` or set "
            "HF_TOKEN; or pass the path of a folder that holds it"
        ) from error
    except RevisionNotFoundError as error:
        raise BundleError(f"{repo} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise BundleError(
            f"no model at {hub_id!r}: it is no local folder, and the hub has no such public model; check the spelling, "
            "or set HF_TOKEN if it is private"
        ) from error
    except (OSError, HfHubHTTPError) as error:
        raise BundleError(
            f"{hub_id} is no local folder and not in the hub cache {constants.HF_HUB_CACHE}, and the hub cannot "
            f"be reached ({type(error).__name__}: {error}); {_remedy(repo)}"
        ) from error


def _remedy(repo: str) -> str:
    return f"run `hf download {repo}` where there is a network, or pass the path of a folder that holds it"
