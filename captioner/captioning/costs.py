"""What each step of one image costs on one machine, and the file that keeps it beside a table.

Measured by `captioner.captioning.measurement`, read by `captioner.captioning.prediction`. Knows no model and no Ray.
"""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from captioner.config import CaptionJobConfig
from captioner.prompts import Prompt
from captioner.storage import Location, Place, Store, StoreError, as_location
from captioner.storage.json_text import parse_json

__all__ = ["Costs", "load_costs", "save_costs", "settings_digest"]

log = logging.getLogger("captioner")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one image costs on one machine, in seconds unless it says otherwise."""

    device: str
    """`cpu` or `cuda`: where the model ran."""

    num_images: int
    """Images in the sample."""

    captioned_share: float
    """Share of them that could be decoded."""

    read_s: float
    """Time until one read task has its row: of a tar or a Parquet file with its bytes, else with its URI."""

    read_cpu_s: float
    """CPU time of that."""

    fetch_s: float
    """Time until the bytes are there, with as many fetches at once as one worker makes."""

    fetch_cpu_s: float
    """CPU time of that."""

    decode_s: float
    encode_s: float
    generate_s: float
    """Time with all slots busy."""

    tokens_per_image: float
    slots: int
    model_threads: int
    """CPU threads that the model ran on."""

    start_s: float
    """Time of a job beside its images: Ray and its pools start, the model loads, the last part is written."""

    fingerprint: str
    """Of the model."""

    settings: str
    """Digest of what else these depend on: see `settings_digest`."""

    @property
    def model_s(self) -> float:
        """Time of one image, decoded or not, on one model worker."""
        return self.captioned_share * (self.encode_s + self.generate_s)

    @property
    def decoder_s(self) -> float:
        """Time of one image on one decode worker, which fetches while it decodes."""
        return max(self.fetch_s, self.decode_s)


def save_costs(costs: Costs, store: Store, output: Place) -> None:
    """Write the costs beside the table that a job is going to make, so that its summary can compare."""
    store.write_atomic(_file(output), (json.dumps(asdict(costs), indent=2) + "\n").encode())


def load_costs(store: Store, output: Place) -> Costs | None:
    """Return the costs that `save_costs` wrote, or None where there are none or they cannot be read.

    They are for comparison only, so that a finished job must not fail over them."""
    try:
        if (data := store.read_or_none(_file(output))) is None:
            return None
        costs = Costs(**parse_json(data))
        if all(_is_well(field.type, getattr(costs, field.name)) for field in fields(costs)):
            return costs
        reason = "a value of another type"
    except (ValueError, TypeError, StoreError) as error:
        reason = f"{type(error).__name__}: {error}"
    log.info("plan_json=ignored reason=%s", reason)
    return None


def settings_digest(job: CaptionJobConfig, prompts: Sequence[Prompt] = ()) -> str:
    """Return a digest of the settings that decide, beside the model and the machine, what an image costs."""
    settings: list[Any] = [asdict(job.decoding), asdict(job.scoring), asdict(job.image)]
    settings += [job.model.dtype, job.resources.slots, *([one.name, one.identity] for one in prompts)]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _is_well(kind: Any, value: object) -> bool:
    if kind is str:
        return isinstance(value, str)
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and math.isfinite(value)


def _file(output: Place) -> Location:
    return as_location(output) / "_run" / "plan.json"
