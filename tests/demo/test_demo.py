"""The demo, on a few conversations and in seconds; its trigram against a slow count."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import pytest
from tiny import pertoken as run_command

import pertoken.demo.demo
from pertoken.data.store.build import build_store
from pertoken.demo.trigram import trigram_nats
from pertoken.recipe.data import DataConfig


def test_the_trigram_is_the_add_k_trigram(write_jsonl, char_tokenizer, tmp_path):
    def store(name: str, texts: list[str]):
        path = str(write_jsonl(name, [{"text": text} for text in texts]))
        data = DataConfig(path=path, max_seq_len=500, store=str(tmp_path / "store"))
        return build_store([path], stage="pretrain", tokenizer=char_tokenizer, data=data)

    train, test = store("a.jsonl", ["The lazy dog", "The dog"]), store("b.jsonl", ["The fox", "dog"])
    size, add = len(char_tokenizer), 0.05
    trigrams, contexts = Counter(), Counter()
    for sample in (train[i] for i in range(len(train))):
        padded = [size, *sample.tokens.tolist()]
        for u, v, w in zip(padded, padded[1:], padded[2:], strict=False):
            trigrams[u, v, w] += 1
            contexts[u, v] += 1
    expected = 0.0
    for sample in (test[i] for i in range(len(test))):
        padded = [size, *sample.tokens.tolist()]
        for u, v, w in zip(padded, padded[1:], padded[2:], strict=False):
            expected -= math.log((trigrams[u, v, w] + add) / (contexts[u, v] + add * size))
    assert trigram_nats(train, test, size, add) == pytest.approx(expected, rel=1e-12)


def test_the_demo_makes_everything_and_says_where_and_what_is_next(tmp_path, monkeypatch):
    real = pertoken.demo.demo._conversations
    monkeypatch.setattr(pertoken.demo.demo, "_conversations", lambda: itertools.islice(real(), 150))
    out = tmp_path / "demo"
    code, printed, err = run_command("demo", "--out", out, "--minutes", 0.02)
    assert code == 0, err
    figures = json.loads((out / "results.json").read_text())
    assert len(figures) == 4
    assert all(math.isfinite(f["bits_per_byte"]) for f in figures.values())
    train, held_out = (
        set((out / "data" / name).read_text().splitlines()) for name in ("conversations.jsonl", "held-out.jsonl")
    )
    assert len(train) + len(held_out) > 140
    assert held_out
    assert not train & held_out
    for line in (out / "data" / "conversations.jsonl").read_text().splitlines()[:20]:
        roles = [m["role"] for m in json.loads(line)["messages"]]
        assert roles[0] == "user"
        assert all(a != b for a, b in itertools.pairwise(roles))
    for part in ("you>", "model>", f"pertoken chat {out / 'sft'}", "results.json"):
        assert part in printed
    for name in ("pretrain", "sft"):
        code, _, err = run_command("train", out / "recipes" / f"{name}.toml")
        assert code == 2, "the recipes are there to be run again"
        assert "holds a run already" in err
