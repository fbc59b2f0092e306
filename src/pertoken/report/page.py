"""Opens the templates, and makes a page of one: nothing in it is loaded, and nothing of the data is obeyed."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pertoken.report.figures import count, percent, seconds, size
from pertoken.report.visible import drawn, shortened
from pertoken.report.words import say

__all__ = ["page"]

_NAME_CHARS, _PROSE_CHARS = 240, 1500
_SPECIAL_TOKEN = re.compile(r"(<[|｜][^<>\s]{1,60}[|｜]>)")


def page(template: str, **values: object) -> str:
    """The page of a template in `templates/`. Raises jinja2.UndefinedError where the template asks for a value that
    was not given, at any depth."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pertoken.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count, percent=percent, seconds=seconds, size=size, name=_name, prose=_prose, piece=_piece
    )
    script = _source(environment, "report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # No other script runs, whatever the data hold.
    environment.globals.update(
        say=say, style=Markup(_source(environment, "report.css")), script=Markup(script), script_digest=digest
    )
    return environment


def _source(environment: Environment, file: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, file)[0]


def _name(value: object) -> Markup:
    """A name in one line, apart from the direction of the text around it."""
    text = shortened(str(value), _NAME_CHARS, say("left_out"))
    return Markup("<bdi>{}</bdi>").format(drawn(text))


def _prose(value: object) -> Markup:
    """A sentence that may hold names."""
    text = shortened(str(value), _PROSE_CHARS, say("left_out"))
    return Markup("<bdi>{}</bdi>").format(drawn(text))


def _piece(value: object) -> Markup:
    """Text of an example, shortened already, with its lines. Within right-to-left text a special token would fall apart
    into its signs, so each is set apart."""
    out = [
        Markup('<bdi dir="ltr">{}</bdi>').format(drawn(text, lines=True)) if i % 2 else drawn(text, lines=True)
        for i, text in enumerate(_SPECIAL_TOKEN.split(str(value)))
    ]
    return Markup("").join(out)
