"""Model folders on the Hugging Face hub: the local cache if it is complete, else the hub itself until loading.

Knows hub ids and nothing of what a model is; imports the hub's client only for a hub id.
`HF_HUB_OFFLINE`, `HF_HUB_CACHE`, `HF_ENDPOINT` and `HF_TOKEN` work as usual. Never downloads pickles.
"""

import json
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from captioner.errors import BundleError
from captioner.storage.urls import is_inside

__all__ = ["MODEL_FILES", "download", "find", "is_hub"]

_SMALL_FILES = ["*.json", "*.jinja", "*.txt"]
MODEL_FILES = [*_SMALL_FILES, "*.safetensors"]
"""The files of a model folder to fetch: no pickles, no weights of other frameworks."""


def find(hub_id: str) -> tuple[AbstractFileSystem, str]:
    """Return store and path of `org/name[@revision]` after fetching its small files.

    The cached snapshot if all weights are in it, else the hub at the same commit. Raises BundleError if it is neither
    cached nor reachable, does not exist, or is gated.
    """
    from huggingface_hub import HfFileSystem, constants

    repo, _, revision = hub_id.partition("@")
    snapshot = _snapshot(hub_id, repo, revision or None, _SMALL_FILES)
    if _has_weights(snapshot):
        return fsspec.filesystem("file"), str(snapshot)
    if constants.HF_HUB_OFFLINE:
        raise BundleError(
            f"{hub_id} is in the hub cache {constants.HF_HUB_CACHE} without all of its weights, and HF_HUB_OFFLINE is "
            f"set; {_remedy(repo)}"
        )
    return HfFileSystem(), f"{repo}@{snapshot.name}"


def is_hub(fs: AbstractFileSystem) -> bool:
    """Whether a store is the hub."""
    return bool(fs.protocol == "hf")


def download(path: str, name: str) -> Path:
    """Return the local folder of the hub path `org/name@commit` after fetching its missing files."""
    repo, _, commit = path.partition("@")
    return _snapshot(name, repo, commit, MODEL_FILES)


def _snapshot(hub_id: str, repo: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    cache = constants.HF_HUB_CACHE
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except errors.GatedRepoError as error:
        raise BundleError(
            f"{repo} is gated: accept its licence at {constants.ENDPOINT}/{repo}, then run `hf auth login` or set "
            "HF_TOKEN; or pass the path of a folder that holds it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BundleError(f"{repo} has no revision {revision!r} on the hub") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise BundleError(
            f"no model at {hub_id!r}: it is no local folder, and the hub has no such public model; check the spelling, "
            "or set HF_TOKEN if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise BundleError(
            f"no model at {hub_id!r}: it is no local folder, not in the hub cache {cache}, and {why}; {_remedy(repo)}"
        ) from error
    except (OSError, errors.HfHubHTTPError) as error:
        raise BundleError(f"cannot fetch {hub_id} from the hub to {cache}: {error}; {_remedy(repo)}") from error


def _has_weights(snapshot: Path) -> bool:
    """Whether all shards are there; also true of pickles, so that the reader of the folder can refuse them."""
    index = snapshot / "model.safetensors.index.json"
    if index.exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        return all(is_inside(shard) and (snapshot / shard).exists() for shard in shards)
    return any(snapshot.glob("*.safetensors")) or any(snapshot.glob("*.bin"))


def _remedy(repo: str) -> str:
    return f"run `hf download {repo}` where there is a network, or pass the path of a folder that holds it"
