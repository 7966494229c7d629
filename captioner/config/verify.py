"""What a user may set for jobs/verify.py."""

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional, arg

from captioner.config.checks import check

__all__ = ["VerifyConfig"]


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Prove that every image of a caption table came out exactly once; exit 1 if one did not."""

    table: Annotated[Positional[str], arg(metavar="OUTPUT")] = "captions-demo"
    """Folder of the caption table, on any fsspec store."""

    storage_options: dict[str, object] = field(default_factory=dict)
    """fsspec options of its store, as JSON. By default the usual environment variables."""

    repair: bool = False
    """Move what a crash or a late writer left into OUTPUT/_run/removed: torn parts, duplicate rows, temporary files.
    Prints first what it moves and why; deletes nothing."""

    compact: bool = False
    """Rewrite many small parts as a few large ones, sorted by key."""

    dry_run: bool = False
    """With --repair: print what it would do, and stop."""

    def __post_init__(self) -> None:
        check(not self.dry_run or self.repair, "--dry-run", self.dry_run, "--repair beside it")
        check(not (self.dry_run and self.compact), "--dry-run", self.dry_run, "--repair without --compact")
