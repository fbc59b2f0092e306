"""Below the command line messages name arguments, as callers of the library know them; it adds its own words."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import pertoken
from pertoken.cli.words import as_flags

SOURCE = Path(pertoken.__file__).parent
ABOVE = {"cli", "demo", "console.py"}
OF_OTHERS = {  # flags of other programs
    "--calculate-per-token-loss",  # Megatron's
    "--nproc-per-node",  # torchrun's
    "--version",  # a compiler's
}
STARTERS = SOURCE / "recipe" / "starter.py"  # what `pertoken new` prints, with commands to copy
BELOW = sorted(p for p in SOURCE.rglob("*.py") if p.relative_to(SOURCE).parts[0] not in ABOVE and p != STARTERS)


@pytest.mark.parametrize("path", BELOW, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_below_the_command_line_names_its_flags(path):
    texts = [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    flags = {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
    assert flags <= OF_OTHERS


@pytest.mark.parametrize(
    ("below", "shown"),
    [
        ("step 3 is saved; continue with resume=True", "step 3 is saved; continue with --resume"),
        ("resume=True continues it, overwrite=True replaces it", "--resume continues it, --overwrite replaces it"),
        ("force=True: going on, though x", "--force: going on, though x"),
        ("read it with verify_data=True", "read it with --verify-data"),
        ("step=12: the run has steps 1 to 10", "--step 12: the run has steps 1 to 10"),
        ("out=/tmp/x: exists already", "--out /tmp/x: exists already"),
        ("model='\\x00': no file", "MODEL '\\x00': no file"),
        ("look closer with: replay('runs/a b', step=7)", "look closer with: pertoken replay 'runs/a b' --step 7"),
        ('with: replay("it\'s", step=7)', f"with: pertoken replay {shlex.quote(chr(39).join(('it', 's')))} --step 7"),
        ("replay('a', step=1) and replay('b', step=2)", "pertoken replay a --step 1 and pertoken replay b --step 2"),
    ],
)
def test_the_command_line_says_arguments_as_flags(below, shown):
    assert as_flags(below) == shown


@pytest.mark.parametrize(
    "text",
    [
        "train.async_save=True, resume=False and my_resume=True",
        "data.format=text: must be",
        "model.hidden_size=3: must be",
        "the step=12 in the middle",
        "out_dir=runs/a: cannot be written",
    ],
)
def test_what_is_no_argument_stays(text):
    assert as_flags(text) == text
