"""Figures in words: counts, shares, sizes and times. What is unknown, None, is a dash."""

from __future__ import annotations

__all__ = ["UNKNOWN", "count", "percent", "seconds", "size"]

UNKNOWN = "–"


def count(value: float | None) -> str:
    """With separators; of a weighted count, at most two decimals."""
    if value is None:
        return UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}".rstrip("0").rstrip(".")


def percent(share: float | None) -> str:
    """A share of 1 in percent. What is neither none nor all is never written as 0% or 100%."""
    if share is None:
        return UNKNOWN
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return UNKNOWN
    amount = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "bytes" or amount >= 100 else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} TiB"


def seconds(value: float | None) -> str:
    """A time in the two largest units that it has."""
    if value is None:
        return UNKNOWN
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes = round(value / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
