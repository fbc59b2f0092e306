"""Our loop against the standard way: transformers' own Qwen3 on padded rows, and plain PyTorch around it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import rows_of

from pertoken import train
from pertoken.data.batch.order import step_at
from pertoken.data.tokens.tokenizer import load_tokenizer
from pertoken.folders.weights import save_folder
from pertoken.model.decoder import CausalLM
from pertoken.runs.data import prepare

pytestmark = pytest.mark.numeric


def padded(samples):
    """(input_ids, attention_mask, labels, mask), [B, T] each, right-padded with zeros."""
    longest = max(len(s) for s in samples)
    rows = []
    for parts in zip(*((s.input_ids, [1] * len(s), s.labels, s.loss_mask) for s in samples), strict=True):
        out = torch.zeros(len(samples), longest, dtype=torch.int64)
        for i, part in enumerate(parts):
            out[i, : len(part)] = torch.tensor([int(x) for x in part])
        rows.append(out)
    return rows


def test_a_plain_padded_loop_over_transformers_gives_the_same_twenty_steps(world, tmp_path):
    from transformers import AutoModelForCausalLM

    recipe = world.recipe(tmp_path / "ours", model__hidden_size=128, train__warmup_steps=3)
    store, _ = prepare(recipe)
    tokenizer = load_tokenizer(world.folder / "tokenizer")
    start = CausalLM(recipe.model.resolve(len(tokenizer)), seed=recipe.train.seed)
    save_folder(start, tmp_path / "start", tokenizer=tokenizer, eos_token_id=tokenizer.eos_token_id)

    train(recipe)
    ours = rows_of(tmp_path / "ours")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step in range(1, 21):
        ids = step_at(step, num_samples=len(store), batch_size=16, seed=42).sample_ids
        input_ids, attention_mask, labels, mask = padded([store[int(i)] for i in ids])
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
        labels = torch.where(mask.bool(), labels, -100)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / mask.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        t = (step - 3) / 17
        lr = 1e-3 * step / 3 if step <= 3 else 1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * t)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert ours[step - 1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert ours[step - 1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert ours[step - 1]["lr"] == pytest.approx(lr, rel=1e-12)
    assert ours[0]["loss"] - ours[-1]["loss"] > 0.5
