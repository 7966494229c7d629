"""What the layers of one step are given besides embeddings and positions: where each row writes, and what it reads."""

from dataclasses import dataclass

from torch import Tensor

from captioner.decoding.plan import StepPlan
from captioner.decoding.stores import Stores


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """T rows: R decode rows, of which row r is slot r, then prompt rows."""

    stores: Stores
    num_rows: int
    """Decode rows R."""

    own_columns: Tensor
    """int64[R]: where a decode row writes in its own slot."""

    columns: Tensor
    """int64[T]: the column of each row, which is its position too."""

    window: int
    """Own columns that decode rows read."""

    targets: Tensor
    """int64[T - R, group]: the slots that a prompt row is written to; it reads the first."""

    plan: StepPlan | None
    """What the host knows of these rows; None where the layers read it all on the device."""
