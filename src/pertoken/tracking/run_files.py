"""`.pertoken.json`: which files in `out_dir` the run has made, as paths relative to it, and in which format."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pertoken.checkpoints.state import refuse_newer
from pertoken.errors import CheckpointError
from pertoken.files import plain_file, write_whole
from pertoken.text import shown
from pertoken.tracking.rows import ROWS_VERSION

__all__ = ["LIST", "claim", "claimed", "refuse_newer_run"]

LIST = ".pertoken.json"


def claim(out_dir: Path, paths: Iterable[Path], *, anew: bool = False) -> None:
    """Note that the run makes `paths`, files or whole folders in `out_dir`; others are passed over. `anew` forgets what
    is noted already. Raises OSError."""
    inside = [str(path.relative_to(out_dir)) for path in paths if path.is_relative_to(out_dir)]
    before = _content(out_dir)
    now = {"format_version": ROWS_VERSION, "written": sorted({*([] if anew else claimed(out_dir)), *inside})}
    if now != before:
        write_whole(out_dir / LIST, json.dumps(now, indent=1) + "\n")


def claimed(out_dir: Path) -> list[str]:
    """The paths in the list; none where there is no list, or it is none of ours."""
    names = _content(out_dir).get("written")
    return [name for name in names if isinstance(name, str) and _is_below(name)] if isinstance(names, list) else []


def refuse_newer_run(out_dir: Path) -> None:
    """Raises CheckpointError where a newer version of pertoken wrote rows and events there."""
    version = _content(out_dir).get("format_version", 1)
    if not isinstance(version, int) or isinstance(version, bool):
        raise CheckpointError(f"{out_dir / LIST}: format_version={shown(version)}: must be a whole number from 1")
    refuse_newer(out_dir / LIST, version, ROWS_VERSION)


def _content(out_dir: Path) -> dict[str, Any]:
    try:
        content = json.loads(plain_file(out_dir / LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_below(name: str) -> bool:
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and "\0" not in name
