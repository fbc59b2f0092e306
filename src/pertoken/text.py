"""Text from users and data, made safe to show."""

from __future__ import annotations

__all__ = ["plain"]


def plain(text: str) -> str:
    """Text that cannot steer a terminal: control characters other than newline and tab are shown, not obeyed."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
