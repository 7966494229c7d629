"""The commands: `captioner NAME ...` and `python jobs/NAME.py ...` mean the same.

Knows what each is for and where its config and its job stand; imports them once a command is known. Ctrl-C before a job
has begun ends with one line, also while Python still imports.
"""

import difflib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from captioner import __version__
from captioner.terminal import say

__all__ = ["COMMANDS", "Command", "main"]


class Command(NamedTuple):
    """What one command does, and where that stands."""

    purpose: str
    """One line of `captioner --help`."""

    config: str
    """The class in `captioner.config` that its flags are made from."""

    job: str
    """The function that it calls, as `package.module:name`."""

    details: tuple[str, ...] = ()
    """Functions whose texts end its help page."""

    continues: bool = True
    """Whether the same command continues where an interrupted one stopped."""


COMMANDS = {
    "caption": Command(
        "caption images into a Parquet table",
        "CaptionJobConfig",
        "captioner.cluster.caption_pipeline:caption_images",
    ),
    "plan": Command(
        "estimate time, workers and price of a caption job",
        "PlanConfig",
        "captioner.captioning.estimate:estimate_job",
    ),
    "verify": Command(
        "prove that every image came out exactly once; repair, compact",
        "VerifyConfig",
        "captioner.tables.verification:verify",
    ),
    "query": Command(
        "query a caption table with SQL, or summarize it",
        "QueryConfig",
        "captioner.gallery.query_job:query_or_page",
        continues=False,
    ),
    "gallery": Command(
        "show captions beside their images, on one page",
        "GalleryConfig",
        "captioner.gallery.gallery_job:gallery",
        continues=False,
    ),
    "export": Command(
        "write captions as trainers and lakes read them",
        "ExportConfig",
        "captioner.cluster.export_pipeline:export_captions",
        details=("captioner.export.formats.table:describe_export_formats",),
    ),
    "evaluate": Command(
        "measure captions against references",
        "EvaluateConfig",
        "captioner.evaluation:evaluate",
        details=("captioner.evaluation:describe_caption_formats", "captioner.evaluation:describe_metrics"),
    ),
    "doctor": Command(
        "look whether a job could run here, and with what",
        "DoctorConfig",
        "captioner.captioning.doctor:doctor",
    ),
    "fit_projector": Command(
        "fit a projector on labelled images",
        "FitConfig",
        "captioner.cluster.projector_training:fit_projector",
        details=("captioner.training.labels:describe_label_formats",),
    ),
}


def main(name: str | None = None, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. name: by default the first word of the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # `nohup` in a script ignores it: so do we
        signal.signal(signal.SIGINT, _end_before_the_job)
    is_script = name is not None
    words = list(sys.argv[1:] if arguments is None else arguments)
    if name is None and (not words or words[0] in ("-h", "--help")):
        say(_help(), sys.stdout)
        return 0
    if words == ["--version"]:
        say([f"captioner {__version__}"], sys.stdout)
        return 0
    asked = name or words.pop(0)
    name = asked.replace("-", "_")
    if not is_script and name == "completion":
        say(_completion(), sys.stdout)
        return 0
    if name not in COMMANDS:
        say([f"error: {_unknown(asked)}"])
        return 2
    return _run(name, words, None if is_script else f"captioner {name}")


def _run(name: str, arguments: Sequence[str], program: str | None) -> int:
    from captioner import command_line, config  # here, not above: Ctrl-C while they are imported ends with a line

    command = COMMANDS[name]
    return command_line.run(
        getattr(config, command.config),
        command.job,
        arguments,
        continues=command.continues,
        details=command.details,
        program=program,
    )


def _end_before_the_job(*_: object) -> None:
    """End at once: an exception might be lost, or be shown with its traceback, in the import that it interrupts."""
    os.write(2, b"\ninterrupted: nothing had begun\n")
    os._exit(130)  # as `command_line.INTERRUPTED`, which is not imported yet


def _completion() -> Iterator[str]:
    """Yield a script by which bash, and zsh with its bashcompinit, completes commands, flags and names of files."""
    from captioner import config
    from captioner.config_file import flag_names

    yield "_captioner() {"
    yield '  local word=${COMP_WORDS[COMP_CWORD]} words=""'
    yield f'  if [ "$COMP_CWORD" -eq 1 ]; then words="{" ".join(COMMANDS)}"'
    yield '  else case "${COMP_WORDS[1]//-/_}" in'
    for name, command in COMMANDS.items():
        flags = [*flag_names(getattr(config, command.config)), "--config", "--help", "--json"]
        yield f'    {name}) words="{" ".join(flags)}" ;;'
    yield "  esac; fi"
    yield '  COMPREPLY=(); case "$word" in -*) ;; *) [ "$COMP_CWORD" -gt 1 ] && return ;; esac'
    yield '  COMPREPLY=($(compgen -W "$words" -- "$word"))'
    yield "}"
    yield "complete -o default -o bashdefault -F _captioner captioner"


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
    return f"{name} is no command; {hint}"


def _help() -> Iterator[str]:
    yield "usage: captioner COMMAND ...      (captioner COMMAND --help lists its flags)"
    yield ""
    yield from (f"  {name:14} {command.purpose}" for name, command in COMMANDS.items())
    yield ""
    yield "captioner completion prints a script for bash and zsh: source <(captioner completion)"
    yield "captioner --version prints the version. In a clone, python jobs/COMMAND.py is captioner COMMAND."
