"""Text from users and data, made safe to show."""

from __future__ import annotations

import logging
import reprlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = ["counted", "escaped_logs", "listed", "names", "one_line", "plain", "reason", "shown"]

_SHOWN_CHARS, _SHOWN_NAMES, _REASON_CHARS = 60, 8, 300
# Format characters that scripts and emoji cannot do without: zero-width non-joiner and joiner.
_HARMLESS = "\n\t\u3000\u00a0\u200c\u200d"


def plain(text: str) -> str:
    """Text that cannot steer a terminal: control characters other than newline and tab, signs that turn the direction
    of writing, and lone surrogates are shown, not obeyed."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _HARMLESS else _escaped(c) for c in text)


def one_line(text: str) -> str:
    """`plain`, with newlines and tabs shown too: what is listed a line each can then not fake another line."""
    return plain(text).replace("\n", "\\n").replace("\t", "\\t")


def shown(value: object) -> str:
    """A value of any type and size as Python writes it, escaped, and shortened to about a line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _SHOWN_CHARS
    try:
        text = short.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return one_line(text if len(text) <= 2 * _SHOWN_CHARS else text[: 2 * _SHOWN_CHARS] + "...")


def counted(number: int, noun: str) -> str:
    """ "1 row", "1,200 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def names(found: Iterable[str]) -> str:
    """Names from data, sorted, escaped and shortened; "none" for none."""
    in_order = sorted(found)
    texts = [one_line(name if len(name) <= _SHOWN_CHARS else name[:_SHOWN_CHARS] + "...") for name in in_order]
    more = f" and {len(texts) - _SHOWN_NAMES} more" if len(texts) > _SHOWN_NAMES else ""
    return (", ".join(texts[:_SHOWN_NAMES]) or "none") + more


def listed(names: list[str]) -> str:
    """The first few of many names from a file, in their order, escaped and shortened."""
    shown = (one_line(name if len(name) <= 100 else name[:100] + "...") for name in names[:5])
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def reason(error: BaseException) -> str:
    """What foreign code says was wrong, in one escaped line of bounded length."""
    return one_line(" ".join(str(error).split())[:_REASON_CHARS]) or type(error).__name__


@contextmanager
def escaped_logs(library: str) -> Iterator[None]:
    """What `library` logs or warns of, while it reads a folder from anywhere, is one escaped line a message."""

    def escape(record: logging.LogRecord) -> bool:
        record.msg, record.args = one_line(record.getMessage()), ()
        return True

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"{filename}:{lineno}: {category.__name__}: {one_line(str(message))}\n"

    handlers, usual = list(logging.getLogger(library).handlers), warnings.formatwarning
    for handler in handlers:
        handler.addFilter(escape)
    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = usual
        for handler in handlers:
            handler.removeFilter(escape)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
