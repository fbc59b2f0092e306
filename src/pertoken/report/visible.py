"""Text of users and data for a page: every character that steers or hides is drawn, and nothing is without end."""

from __future__ import annotations

from itertools import groupby

from markupsafe import Markup, escape

__all__ = ["drawn", "drawn_text", "shortened"]

# Zero-width non-joiner and joiner: scripts and emoji need them between their own characters, and nothing else does.
_JOINERS = "\u200c\u200d"
_WRITTEN = "\u3000\u00a0"  # the spaces that text of many languages has


def shortened(text: str, limit: int, missing: str) -> str:
    """`text`, or where it is longer than `limit` characters its beginning and end around `missing`, in which
    `{count}` stands for the number of characters left out."""
    if len(text) <= limit:
        return text
    tail = limit // 5
    head = limit - tail
    return text[:head] + missing.format(count=f"{len(text) - limit:,}") + text[len(text) - tail :]


def drawn_text(text: str, *, lines: bool = False) -> str:
    """`text` with a picture for each control character, and the code of each other one that cannot be seen or turns
    the direction of writing. With `lines`, a newline's picture is followed by the newline."""
    return "".join(picture or c for c, picture in _pictures(text, lines=lines))


def drawn(text: str, *, lines: bool = False) -> Markup:
    """`drawn_text` as HTML, escaped, with the pictures marked by the class `ctl`."""
    out = []
    for is_picture, group in groupby(_pictures(text, lines=lines), key=lambda pair: bool(pair[1])):
        shown = "".join(picture or c for c, picture in group)
        out.append(Markup('<i class="ctl">{}</i>').format(shown) if is_picture else escape(shown))
    return Markup("").join(out)


def _pictures(text: str, *, lines: bool) -> list[tuple[str, str]]:
    """Each character with its picture, "" for one that is shown as it is."""
    found = []
    for i, c in enumerate(text):
        if c.isprintable() or c in _WRITTEN:
            picture = ""
        elif c in _JOINERS:
            between = text[i - 1 : i] > "\x7f" and text[i + 1 : i + 2] > "\x7f"
            picture = "" if between else _code(c)
        elif c == "\n":
            picture = "↵\n" if lines else "↵"
        elif c == "\t":
            picture = "⇥"
        elif c < " ":
            picture = chr(0x2400 + ord(c))
        else:
            picture = "\u2421" if c == "\x7f" else _code(c)
        found.append((c, picture))
    return found


def _code(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"
