"""What a layout of published checkpoints is, and what a user may set for a checkpoint of one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from captioner.model.folder import Folder, StorageOptions, check_server, open_folder, options_for
from captioner.model.parts import Parts

__all__ = ["CheckpointOptions", "Layout", "Opener"]


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What a user may set for a published checkpoint; bundles have all of it inside."""

    prompt: str | None = None
    """A question in place of the default one, or a whole prompt with `{image}` or `<image>`."""

    system_prompt: str | None = None
    tokenizer: str | None = None
    """A folder, URL or hub id whose tokenizer is used."""

    vision_tower: str | None = None
    """A folder, URL or hub id of the vision tower, in place of the one that the checkpoint names."""


@dataclass(frozen=True, kw_only=True)
class Opener:
    """Opens the folders that a checkpoint or its user names."""

    storage_options: StorageOptions
    is_on_disk: bool
    """Whether weights will be loaded, so that folders on a store are copied to the local cache."""

    allow_remote_parts: bool

    def open(
        self, location: str, checkpoint: Folder, *, needs_weights: bool = True, is_named_inside: bool = False
    ) -> Folder:
        """Return a folder that the user named, or, with `is_named_inside`, the checkpoint or bundle itself.

        needs_weights: false for configs and a tokenizer alone, for which no weights are fetched. Raises BundleError for
        a URL inside on another server than the checkpoint's, unless such URLs are followed."""
        if is_named_inside and not self.allow_remote_parts:
            check_server(location, checkpoint)
        options = options_for(location, self.storage_options, checkpoint.name)
        found = open_folder(location, options, inside=checkpoint)
        return found.on_disk() if self.is_on_disk and needs_weights else found


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout of published checkpoints."""

    name: str
    """The class or model_type by which people know it."""

    matches: Callable[[Mapping[str, Any]], bool]
    """Whether a config.json is of this layout."""

    read: Callable[[Folder, CheckpointOptions, Opener], Parts]
    """Return the parts of a checkpoint from its config, tokenizer and headers."""
