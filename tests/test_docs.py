"""What docs/extending.md shows is run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pertoken import Recipe
from pertoken.data.files.records import Record
from pertoken.data.formats import FORMATS, to_conversation
from pertoken.data.store.store import build_store
from pertoken.errors import RecipeError

DOCS = Path(__file__).parents[1] / "docs"


def section(title: str) -> str:
    """The lines of docs/extending.md from `## title` to the next heading of that level."""
    return (DOCS / "extending.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def code_of(text: str) -> dict[str, Any]:
    """What the Python blocks of a section define."""
    found: dict[str, Any] = {"__name__": "docs"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/extending.md", "exec"), found)
    return found


def test_the_format_of_the_docs_is_one_file_and_one_line_of_the_dict(
    tmp_path: Path, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = section("A format")
    assert 0 < len(text.splitlines()) < 60
    alpaca = code_of(text)["ALPACA"]
    file = tmp_path / "a.jsonl"
    row = {"instruction": "Add.", "input": "2+2", "output": "4", "id": 7}
    file.write_text("".join(json.dumps(r) + "\n" for r in (row, {"instruction": "Say hi.", "output": "Hi"})))
    values = {
        "stage": "sft",
        "out_dir": str(tmp_path / "run"),
        "data": {"path": str(file), "tokenizer": "t", "store": str(tmp_path / "store"), "format": "alpaca"},
    }
    with pytest.raises(RecipeError, match=r"data\.format='alpaca': must be one of"):
        Recipe.parse(values)
    monkeypatch.setitem(FORMATS, alpaca.name, alpaca)
    data = Recipe.parse(values).data
    store = build_store(data.path, stage="sft", tokenizer=bpe_tokenizer, data=data)
    said = [bpe_tokenizer.decode(store[i].labels[store[i].loss_mask]) for i in range(len(store))]
    assert said == ["4<|im_end|>", "Hi<|im_end|>"]
    assert bpe_tokenizer.decode(store[0].tokens).startswith("<|im_start|>user\nAdd.\n\n2+2<|im_end|>")
    (note,) = store.report.notes()
    assert note.endswith(f": id (1 rows, the first {file}:1)"), "what is not read is said"
    assert to_conversation(Record("a", 1, row, 0, 0)) == to_conversation(Record("a", 1, row, 0, 0), "alpaca")
    assert str(to_conversation(Record("a", 1, row | {"output": ""}, 0, 0))).startswith("a:1: output: no text, so")
