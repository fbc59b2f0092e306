"""The options of other trainers, as docs/coming-from.md lists them.

python tests/coming_from.py          write the page's section "Options"
"""

from __future__ import annotations

from pathlib import Path

from pertoken.recipe.peers import PEERS, Option

__all__ = ["DOCUMENT", "HEADING", "options"]

DOCUMENT = Path(__file__).parents[1] / "docs" / "coming-from.md"
HEADING = "## Options\n"


def _here(option: Option) -> str:
    if option.kind == "key":
        return f"`{option.key}`"
    return {"done": "needs nothing", "absent": "not there"}[option.kind]


def options() -> str:
    """The section: a table for each trainer, in the order of `PEERS`."""
    peers = dict.fromkeys(peer for option in PEERS.values() for peer in option.peers)
    parts = [HEADING]
    for peer in peers:
        also = " (and TRL, LLaMA-Factory, ms-swift, which take these too)" if peer == "transformers" else ""
        rows = [f"| `{n}` | {_here(o)} | {o.remark} |" for n, o in PEERS.items() if peer in o.peers]
        parts.append("\n".join([f"### {peer}{also}\n", "| there | here | |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def main() -> None:
    head, _, _ = DOCUMENT.read_text(encoding="utf-8").partition(HEADING)
    DOCUMENT.write_text(head + options(), encoding="utf-8")


if __name__ == "__main__":
    main()
