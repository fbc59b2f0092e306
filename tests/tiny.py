"""A tiny world for tests: chats with skewed shares of supervised tokens, a tokenizer, recipes, the commands."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pertoken import Recipe
from pertoken.cli.commands import main
from pertoken.data.tokens.train import train_tokenizer
from pertoken.tracking.rows import StepRow

MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
}
WORDS = "red green blue cat dog sun moon one two three runs sleeps eats sings near under over".split()
TIMES = ("step_s", "tokens_per_s")  # the only parts of a row that differ between equal runs


def write_chats(path: Path, n: int, seed: int = 0) -> Path:
    """`n` chats whose supervised share goes from about 1% to about 90%, of 40 to 500 characters."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> str:
        return " ".join(rng.choice(WORDS, max(1, count)))

    rows = []
    for i in range(n):
        share, total = (i % 10 + 0.1) / 10, int(rng.integers(8, 90))
        rows.append(
            [
                {"role": "user", "content": words(round(total * (1 - share)))},
                {"role": "assistant", "content": words(round(total * share)) if i % 10 else "ok"},
            ]
        )
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class World:
    """A folder with `chats.jsonl`, `held-out.jsonl` and a tokenizer."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, n: int = 101) -> World:
        chats = write_chats(folder / "chats.jsonl", n)
        write_chats(folder / "held-out.jsonl", 12, seed=1)
        train_tokenizer([str(chats)], vocab_size=None, kind="char", out_dir=folder / "tokenizer")
        return cls(folder)

    def recipe(self, out: Path, **changes: Any) -> Recipe:
        """float32, AdamW at 1e-3, evaluation data; `changes` are dotted keys with `__` for the dot."""
        values: dict[str, Any] = {
            "stage": "sft",
            "out_dir": str(out),
            "model": dict(MODEL),
            "data": {
                "path": str(self.folder / "chats.jsonl"),
                "eval_path": str(self.folder / "held-out.jsonl"),
                "tokenizer": str(self.folder / "tokenizer"),
                "max_seq_len": 700,
                "store": str(self.folder / "store"),
            },
            "train": {
                "batch_size": 16,
                "max_steps": 20,
                "learning_rate": 1e-3,
                "weight_decay": 0.1,
                "dtype": "float32",
                "device": "cpu",
            },
        }
        for key, value in changes.items():
            *sections, leaf = key.split("__")
            inner = values
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[leaf] = value
        return Recipe.parse(values)

    def write_recipe(self, out: Path, **changes: Any) -> Path:
        path = out.with_suffix(".toml")
        path.write_text(self.recipe(out, **changes).to_toml())
        return path


def row_of(step: int, **changes: Any) -> StepRow:
    """A row of a step of two samples."""
    figures: dict[str, Any] = {"epoch": 1, "loss": 1.0, "loss_sum": 2.0, "num_tokens": 2, "grad_norm": 3.0, "lr": 0.1}
    figures |= {"samples": 2, "positions": [2 * step - 2, 2 * step]}
    return StepRow(step=step, **figures | changes)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def pertoken(*args: object, stdin: str = "") -> tuple[int, str, str]:
    """Run a command in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["pertoken", *map(str, args)]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return code, out.getvalue(), err.getvalue()
