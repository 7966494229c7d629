"""The one form in which a value is refused: the flag, the value, what was expected."""

from captioner.errors import ConfigError

__all__ = ["DAY_S", "check", "check_hosts", "flag_name", "is_count", "typed", "worker_range"]

DAY_S = 86_400
"""The longest time that a flag may say: system timers take no infinity, and overflow far above this."""


def check(holds: bool, flag: str, value: object, expected: str) -> None:
    """Raise ConfigError unless `holds`."""
    if not holds:
        raise ConfigError(f"{flag} is {value}; expected {expected}")


def check_hosts(allows_local: bool, denies_private: bool) -> None:
    """Raise ConfigError for both of the flags that say which hosts a list may lead to."""
    check(not (allows_local and denies_private), "--deny-private-hosts", True, "no --allow-local-uris beside it")


def flag_name(field: str) -> str:
    """Return the flag of a config's field: `--num-beams` of `num_beams`."""
    return "--" + field.replace("_", "-")


def typed(text: str) -> str:
    r"""Return a text as it was meant on a command line: `\n` is a line break, `\t` a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def is_count(text: str) -> bool:
    """Return whether the text is a whole number from 1 up."""
    return text.isdecimal() and int(text) >= 1


def worker_range(text: str, flag: str) -> tuple[int, int] | None:
    """Return `(min, max)` of `8` or `1:8`, or None for `auto`. Raises ConfigError for anything else."""
    if text == "auto":
        return None
    low, _, high = text.partition(":")
    high = high or low
    expected = "`auto`, a number from 1 up, or `min:max`"
    check(is_count(low) and is_count(high), flag, text, expected)
    check(int(low) <= int(high), flag, text, expected)
    return int(low), int(high)
