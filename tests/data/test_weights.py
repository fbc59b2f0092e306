"""Weights of messages: in the samples, in what the loss is divided by, and in everything that counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import rows_of, untimed

from pertoken import train
from pertoken.data.batch.share import share_of
from pertoken.data.chat.render import ChatTemplate, rendered_chat
from pertoken.data.formats import Conversation
from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.data.tokens.encode import Encoder, TextWithSpans
from pertoken.data.tokens.tokenizer import load_tokenizer
from pertoken.inference.token_losses import token_losses
from pertoken.model.decoder import CausalLM
from pertoken.objective.terms import CROSS_ENTROPY
from pertoken.prove.case import gradient_of_step
from pertoken.prove.run import prove
from pertoken.recipe.data import DataConfig
from pertoken.runs.data import prepare
from pertoken.runs.replay import replay
from pertoken.training.precision import Precision

pytestmark = pytest.mark.numeric


CLASSES = ("rows, token by token", "who is supervised", "one sample per micro-batch", "kernels", "update, clipped")
CLASSES += ("evaluation", "transformers, padded")


def _chat(*answers: str) -> list[dict[str, str]]:
    said = [turn for answer in answers for turn in (("user", "fox"), ("assistant", answer))]
    return [{"role": role, "content": text} for role, text in said]


def _row(messages: list[dict[str, Any]], weights: list[float]) -> dict[str, Any]:
    return {"messages": [message | {"weight": weight} for message, weight in zip(messages, weights, strict=True)]}


def _build(path: Path, tokenizer: Any) -> Store:
    data = DataConfig.model_validate({"path": str(path), "format": "messages", "store": str(path.parent / "cache")})
    return build_store([str(path)], stage="sft", tokenizer=tokenizer, data=data)


def test_the_store_keeps_the_weights_and_their_exact_sums(write_jsonl: Any, bpe_tokenizer: Any) -> None:
    rows = [
        _row(_chat("the dog", "café"), [0, 0.3, 0, 1]),
        _row(_chat("a", "b"), [0, 1, 0, 0]),
    ]
    store = _build(write_jsonl("a.jsonl", rows), bpe_tokenizer)
    mask, ordinary = store[0].loss_mask, store[1].loss_mask
    assert (mask.dtype, ordinary.dtype) == (np.float32, np.bool_)
    assert {float(w) for w in mask} == {0.0, 1.0, float(np.float32(0.3))}
    num_tokens = [float(mask.astype(np.float64).sum()), float(ordinary.sum())]
    assert store.num_tokens.tolist() == num_tokens
    assert store.report.num_tokens == store.count() == sum(num_tokens)
    plain = len("the dog") * np.float64(np.float32(0.3)) + len("café".encode())
    assert store.num_bytes.tolist() == [pytest.approx(plain, abs=0), 1]


def test_weights_of_0_and_1_make_the_samples_that_have_always_been(write_jsonl: Any, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [_row(_chat("a", "b"), [0, 1, 0, 1])])
    store = _build(path, bpe_tokenizer)
    assert (store.num_tokens.dtype, store.num_bytes.dtype, store[0].loss_mask.dtype) == (np.int64, np.int64, np.bool_)
    assert type(store.report.num_tokens) is int


def test_a_store_without_weights_is_larger_by_four_bytes_a_sample_at_most(write_jsonl: Any, bpe_tokenizer: Any) -> None:
    rows = [_row(_chat(f"a {i}"), [0, 1]) for i in range(2000)]
    store = _build(write_jsonl("a.jsonl", rows), bpe_tokenizer)
    (file,) = (write_jsonl("b.jsonl", []).parent / "cache").glob("*/samples.arrow")
    of_samples = 5 * int(store.lengths.sum()) + 4 * len(store)  # tokens are one more than inputs
    assert file.stat().st_size < of_samples + (4 + 4 + 4 + 4 + 8 + 8 + 4 + 4 + 8 + 8 + 1) * len(store) + 4096


@pytest.mark.parametrize("weights", [[-1.0], [float("nan")], [float("inf")], [1.0, 1.0]])
def test_weights_that_mean_nothing_never_come_that_far(weights: list[float]) -> None:
    with pytest.raises(AssertionError):
        TextWithSpans("a", [(0, 1)], weights)


@pytest.mark.parametrize("marks", [True, False])
def test_a_turns_weight_is_that_of_its_tokens(bpe_tokenizer: Any, marks: bool) -> None:
    if not marks:
        bpe_tokenizer.chat_template = bpe_tokenizer.chat_template.replace("{%- generation %}", "").replace(
            "{%- endgeneration %}", ""
        )
    chat = Conversation(_chat("the", "dog", "x"), None, (0, 0.5, 0, 0, 0, 2))
    (text,) = rendered_chat(chat, ChatTemplate(bpe_tokenizer, {})).samples
    assert [text.text[a:b] for a, b in text.spans] == ["the<|im_end|>", "x<|im_end|>"]
    assert text.weights == [0.5, 2]
    (encoded,) = Encoder(bpe_tokenizer).encode([text])
    assert set(encoded.supervised.tolist()) == {0, 0.5, 2}


def test_a_long_text_in_pieces_has_the_weights_of_the_whole(
    bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pertoken.data.tokens.cuts._PIECE_CHARS", 20)
    monkeypatch.setattr("pertoken.data.tokens.cuts._LONGEST_CHARS", 100)
    text = "the quick fox <|im_end|> " * 8
    marked = TextWithSpans(text, [(3, 50), (60, 61), (90, 150)], [0.5, 1, 0.25], typed=[(14, 24), (64, 74)])
    encoder = Encoder(bpe_tokenizer)
    (whole,), pieces = encoder.encode([marked]), list(encoder.pieces(marked))
    assert len(pieces) > 3
    assert np.concatenate([piece.tokens for piece in pieces]).tolist() == whole.tokens.tolist()
    assert np.concatenate([piece.supervised for piece in pieces]).tolist() == whole.supervised.tolist()
    assert 0.25 in whole.supervised


@pytest.fixture
def run_recipe(world: Any, tmp_path: Path) -> Any:
    rows = [json.loads(line) for line in (world.folder / "chats.jsonl").read_text().splitlines()]
    values = [0.5, 1, 2, 0.3]
    path = tmp_path / "weighted.jsonl"
    path.write_text("".join(json.dumps(_row(r["messages"], [0, values[i % 4]])) + "\n" for i, r in enumerate(rows)))

    def make(out: str, **changes: Any) -> Any:
        paths = {"data__path": str(path), "data__eval_path": str(path), "data__format": "messages"}
        return world.recipe(tmp_path / out, **{**paths, "train__max_steps": 4, "train__eval_interval": 2, **changes})

    return make


def test_prove_is_green_on_weighted_data(run_recipe: Any) -> None:
    proof = prove(run_recipe("proof"), only=CLASSES, tokens=300)
    assert [result for result in proof.results if result.verdict != "passed"] == []


def test_rows_carry_the_sum_of_weights_and_a_resume_is_bitwise(run_recipe: Any, tmp_path: Path) -> None:
    train(run_recipe("whole"))
    train(run_recipe("half", train__max_steps=4, checkpoint__save_interval=2))
    whole, half = tmp_path / "whole", tmp_path / "half"
    shutil.rmtree(half / "checkpoints" / "step-00000004")
    (half / "metrics.jsonl").write_text("")  # so that rows come from the checkpoint
    train(run_recipe("half", checkpoint__save_interval=2), resume=True)
    rows = rows_of(whole)
    assert any(isinstance(row["num_tokens"], float) for row in rows)
    resumed = rows_of(half)
    assert [row["num_tokens"] for row in resumed] == [row["num_tokens"] for row in rows]
    assert untimed(resumed)[2:] == untimed(rows)[2:]
    left, right = ((run / "checkpoints" / "step-00000004" / "model.safetensors").read_bytes() for run in (whole, half))
    assert left == right
    again = replay(whole, 3)
    assert {c.name: c.verdict for c in again.compared}["num_tokens"] == "equal"
    losses = token_losses(again.computation.model, again.computation.store[0], again.tokenizer)
    assert {loss.weight for loss in losses} == {0, float(again.computation.store[0].loss_mask.max())}


def test_gradient_and_loss_are_those_of_a_plain_loop(run_recipe: Any) -> None:
    """On its own: nll times the weight, divided by the sum of weights, in float64."""
    recipe = run_recipe("plain", train__dtype="float64")
    store, _ = prepare(recipe)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    model = CausalLM(recipe.model.resolve(len(tokenizer)), seed=0, dtype=torch.float64)
    ids = np.arange(9)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for i in ids:
        sample = store[int(i)]
        batch = share_of(store, np.array([i]), token_budget=10**6).micro_batches[0]
        nll = F.cross_entropy(model.logits(model.hidden_states(batch)), batch.labels, reduction="none")
        total = total + (nll * torch.from_numpy(sample.loss_mask.astype(np.float64))).sum()
        weights += float(sample.loss_mask.astype(np.float64).sum())
    torch.autograd.backward(total / weights)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for budget in (100, 10**6):
        share = share_of(store, ids, token_budget=budget)
        precision = Precision("float64", torch.device("cpu"))
        found = gradient_of_step(model, share, precision=precision, objective=CROSS_ENTROPY)
        assert found.loss == pytest.approx(float(total.detach()) / weights, rel=1e-12)
        for name, gradient in found.gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
