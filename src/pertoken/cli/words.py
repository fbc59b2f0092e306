"""Messages in the command line's words.

Below the command line, messages name arguments as Python has them (`resume=True`), since callers of the library read
them too. What the command line shows of them passes through `as_flags`.
"""

from __future__ import annotations

import ast
import re
import shlex

__all__ = ["as_flags"]

_SWITCHES = ("resume", "overwrite", "force", "verify_data", "merge")
_OPTIONS = ("step", "out", "format", "dtype", "only", "tokens", "prompt", "json", "html", "samples", "worst")
_POSITIONAL = {"recipe": "RECIPE", "model": "MODEL", "data": "DATA", "run": "RUN"}

_SWITCH = re.compile(rf"\b({'|'.join(_SWITCHES)})=True\b")
_LEADING = re.compile(rf"({'|'.join((*_OPTIONS, *_POSITIONAL))})=")
_REPLAY = re.compile(r"""\breplay\(('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"), step=(\d+)\)""")


def as_flags(text: str) -> str:
    """`text` with `resume=True` as `--resume` wherever it stands, the argument that a message begins with as its
    option, and a call of `replay` as the command to copy."""
    text = _SWITCH.sub(lambda found: f"--{found[1].replace('_', '-')}", text)
    text = _REPLAY.sub(
        lambda found: f"pertoken replay {shlex.quote(ast.literal_eval(found[1]))} --step {found[2]}", text
    )
    if leading := _LEADING.match(text):
        name = leading[1]
        text = f"{_POSITIONAL.get(name, f'--{name}')} {text[leading.end() :]}"
    return text
