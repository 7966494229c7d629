"""The storage options of everything that a fit reads and writes: LABELS, the models, the output.

Knows URLs and flags; opens nothing.
"""

from captioner.config import FitConfig
from captioner.config.checks import check
from captioner.storage.urls import absolute, redact, scheme, server
from captioner.training.fit.fit_output import FitOutput

__all__ = ["model_options", "named_model", "options_at", "part_options"]


def options_at(url: str, config: FitConfig) -> dict[str, object]:
    """Return the storage options of a URL: the output's on the output's server, else those of LABELS on theirs.

    If LABELS is local, its options are for any remote store: it needs none itself."""
    own, of_labels = config.target.output_storage_options, config.labels.storage_options
    of = server(absolute(url))
    if own is not None and of == server(absolute(config.target.output)):
        return own
    local = server("/")
    return of_labels if server(config.labels.labels_path) in (of, local) and of != local else {}


def model_options(config: FitConfig, output: FitOutput) -> dict[str, object]:
    """Return the storage options of the initial bundle, which the parts that it names share on its server alone.

    Those of a local bundle are for its parts. Raises ConfigError for parts on another store than a remote bundle's."""
    part, given = named_model(config), config.model.model_storage_options
    if scheme(output.url) == "file":
        return part_options(part, config)
    is_shared = given is None or server(absolute(part)) in (server(absolute(output.url)), server("/"))
    check(
        is_shared,
        "--model-storage-options",
        f"given for {redact(part)}, which {redact(output.url)} will name",
        "an OUTPUT_BUNDLE of this machine or on the model's own store",
    )
    return output.storage_options


def named_model(config: FitConfig) -> str:
    """Return the model that a user named, or the first part of one."""
    return config.model.model or config.model.clip or "demo"


def part_options(part: str, config: FitConfig) -> dict[str, object]:
    """Return the storage options of a model: those given, else those of the output or LABELS where it is theirs."""
    given = config.model.model_storage_options
    is_named = server(absolute(part)) == server(absolute(named_model(config)))
    return given if given is not None and is_named else options_at(part, config)
