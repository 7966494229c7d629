"""Everything this package raises on purpose.

Bad data never raises: it is a row with a reason (see `captioner.schema.RejectReason`). Bad use raises before any
accelerator is taken, and says which value, what was expected and what to do.

    CaptionerError
    ├── UsageError            the caller can fix it; the command line exits with 2
    │   ├── ConfigError       a flag or a config value
    │   ├── InputError        the images: no such path, nothing there, no such column
    │   ├── BundleError       the model: a file is missing, or two parts do not fit each other
    │   │   └── ShapeError    two widths that must be equal are not
    │   ├── OutputError       the output folder belongs to another run
    │   └── ResourceError     the machine or the cluster cannot hold what was asked for
    └── JobError              the job itself failed; the command line exits with 1
        └── EngineError       the decoding engine stopped; its cause is attached
"""

__all__ = [
    "BundleError",
    "CaptionerError",
    "ConfigError",
    "EngineError",
    "InputError",
    "JobError",
    "OutputError",
    "ResourceError",
    "ShapeError",
    "UsageError",
]


class CaptionerError(Exception):
    """Root of all errors raised on purpose."""


class UsageError(CaptionerError):
    """The caller asked for something that cannot be done as asked."""


class ConfigError(UsageError):
    """A flag or config value is out of its range or contradicts another."""


class InputError(UsageError):
    """The input cannot be listed, or holds no image."""


class BundleError(UsageError):
    """A model bundle is incomplete, or its parts do not belong together."""


class ShapeError(BundleError):
    """Two tensor widths that must be equal are not."""


class OutputError(UsageError):
    """The output folder holds something that this run must not touch."""


class ResourceError(UsageError):
    """The machine or cluster cannot hold what was asked for."""


class JobError(CaptionerError):
    """The job failed for a cause that no single image can have."""


class EngineError(JobError):
    """The decoding engine stopped; `__cause__` says why."""
