"""The page of an audit: what training on this data would lose, and what it would learn from the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pertoken.report.charts import histogram, stack
from pertoken.report.page import page
from pertoken.report.visible import drawn_text, shortened
from pertoken.report.words import say

__all__ = ["audit_page"]

_FORMAT_VERSION = 1
_MOST_FILES, _MOST_LISTED, _MOST_EXAMPLES, _MOST_PIECES = 500, 200, 50, 400
_PIECE_CHARS, _EXAMPLE_CHARS = 4000, 20_000
_PLAN = ("batch_size", "steps_per_epoch", "total_steps", "epochs", "padding_share", "micro_batches")
_ESTIMATE = ("parameters", "memory_total_bytes", "memory_available_bytes", "seconds")
_LOST = ("skipped", "overlong", "truncated", "unsupervised", "too_short")


@dataclass(frozen=True)
class _Example:
    source: str
    why: str
    pieces: list[tuple[str, bool]]
    missing: int  # pieces that are not shown


def audit_page(audit: dict[str, Any]) -> str:
    """A self-contained HTML page of what `Audit.to_dict` gives (`format_version` 1). Texts in it may be
    hostile. Long texts and long lists are shortened, and the page says where.

    Raises ValueError for another `format_version`, jinja2.UndefinedError or KeyError where a key is missing.
    """
    if audit["format_version"] != _FORMAT_VERSION:
        raise ValueError(f"format_version={audit['format_version']!r}: this page is made of {_FORMAT_VERSION}")
    parts = [_part(part) for part in audit["parts"]]
    estimate = audit["estimate"] or dict.fromkeys(_ESTIMATE) | {"memory_bytes": {}, "how": say("unknown")}
    total, available = estimate["memory_total_bytes"] or 0, estimate["memory_available_bytes"]
    whole = max(total, available or 0)
    harmed = [problem["count"] for problem in audit["problems"] if problem["harms"]]
    examples = [_example(example) for example in audit["examples"][:_MOST_EXAMPLES]]
    return page(
        "audit.html",
        audit=audit,
        plan=audit["plan"] or dict.fromkeys(_PLAN),
        estimate=estimate,
        harmed=None if None in harmed else sum(harmed),
        parts=parts,
        trained=next((part for part in parts if part["part"] == "train"), None),
        evaluated=next((part for part in parts if part["part"] == "eval"), None),
        problems=audit["problems"],
        examples=examples,
        memory=stack(estimate["memory_bytes"] or {}, whole),
        memory_whole=whole,
        methods=list((estimate.get("memory_by_method") or {}).items()),
        too_much=available is not None and total > available,
        most_listed=_MOST_LISTED,
    )


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part as the page shows it: its files with problems first, and only the columns that hold something."""
    files = sorted(part["files"], key=_lost, reverse=True)
    lengths = part["lengths"] or {"edges": [], "counts": []}
    return part | {
        "title": say(part["part"]) if part["part"] in ("train", "eval") else drawn_text(str(part["part"])),
        "files": files[:_MOST_FILES],
        "num_files": len(files),
        "columns": [name for name in _LOST if any(file[name] for file in files)],
        "has_sources": any(file["source"] is not None for file in files),
        "histogram": histogram(lengths["edges"], lengths["counts"]),
    }


def _lost(file: dict[str, Any]) -> float:
    return float(sum(file[name] or 0 for name in _LOST))


def _example(example: dict[str, Any]) -> _Example:
    """Bounded in its pieces, and in its characters: a piece of millions keeps its beginning and end."""
    merged = _merged(example["pieces"])
    left, pieces = _EXAMPLE_CHARS, []
    for text, supervised in merged[:_MOST_PIECES]:
        if left <= 0:
            break
        text = shortened(text, min(_PIECE_CHARS, max(left, 100)), say("left_out"))
        left -= len(text)
        pieces.append((text, supervised))
    return _Example(example["source"], example["why"], pieces, len(merged) - len(pieces))


def _merged(pieces: Sequence[Sequence[Any]]) -> list[tuple[str, bool]]:
    """Neighbors of one kind as one: a mark of its own for each token would only be noise."""
    if not pieces:
        return []
    starts = [0, *(i for i, (a, b) in enumerate(pairwise(pieces), 1) if bool(a[1]) != bool(b[1])), len(pieces)]
    return [("".join(text for text, _ in pieces[a:b]), bool(pieces[a][1])) for a, b in pairwise(starts)]
