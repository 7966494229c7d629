"""A process of a job imports transformers without what no captioner uses, and captions as it does with it."""

import subprocess
import sys
from pathlib import Path

import pytest

import captioner

IMAGE = next((Path(captioner.__file__).parent / "demo" / "images").iterdir())
BEGINNING = """
import logging, sys
logging.basicConfig()
from captioner.model import light_imports
light_imports.import_transformers()
"""
CAPTION = f"""
from captioner import Captioner
with Captioner.from_bundle("demo") as captioner:
    print(captioner.caption({str(IMAGE)!r}).caption)
"""
LEFT_OUT = """
print(*{"sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"} & set(sys.modules))
"""
REAL_ONES = """
import torch, torch.distributed.tensor
from transformers import masking_utils
assert torch._dynamo.is_compiling() is False and torch.distributed.is_available()
with masking_utils.TransformGetItemToIndex() as found:
    assert type(masking_utils.TransformGetItemToIndex()).__module__.startswith("torch._dynamo")
"""


def run(*pieces: str) -> tuple[list[str], str]:
    """Return the lines of stdout and stderr of a process that runs these pieces."""
    done = subprocess.run([sys.executable, "-c", "".join(pieces)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.slow
def test_a_model_captions_without_the_compiler_and_as_it_does_at_a_release_that_wants_more_of_it() -> None:
    lines, log = run(BEGINNING, CAPTION, LEFT_OUT, REAL_ONES)
    assert lines[1:] == [""], "a release imports more: find by which way"
    assert log == "", "a release wants more of the compiler: find what"
    opening, _, end = BEGINNING.rpartition("light_imports.")
    plain, log = run(opening, "del light_imports._Compiler.allow_in_graph\nlight_imports.", end, CAPTION)
    assert plain == lines[:1]
    assert "transformers=as_it_comes reason=" in log
