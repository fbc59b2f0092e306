"""A row has its types, and the keys that it always had."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from tiny import row_of

from pertoken.tracking.ledger import Ledger
from pertoken.tracking.rows import StepRow

OLD_ROWS = Path(__file__).parents[1] / "fixtures" / "old_run" / "metrics.jsonl"
EVERY_ROW = """step epoch loss loss_sum num_tokens aux_loss grad_norm lr samples tokens micro_batches padding_share
step_s tokens_per_s positions""".split()


def test_a_row_of_an_earlier_version_is_read_and_written_to_the_byte():
    for line in OLD_ROWS.read_text().splitlines():
        row = StepRow.from_json(json.loads(line))
        assert json.dumps(row.to_json()) == line


def test_every_row_has_the_same_keys_first_and_others_only_where_they_apply():
    assert list(row_of(1).to_json()) == EVERY_ROW
    row = row_of(2, skipped=False, loss_scale=2.0, eval_loss=1.0, spike=11.0)
    assert list(row.to_json()) == [*EVERY_ROW, "loss_scale", "skipped", "spike", "eval_loss"]


def test_a_figure_that_is_not_finite_is_null_and_comes_back_as_no_number():
    row = row_of(1, grad_norm=math.inf, eval_perplexity=math.inf)
    values = json.loads(json.dumps(row.to_json(), allow_nan=False))
    assert values["grad_norm"] is None
    assert values["eval_perplexity"] is None
    again = StepRow.from_json(values)
    assert math.isnan(again.grad_norm)
    assert again.loss == 1.0


@pytest.mark.parametrize(
    "change",
    [{"loss": "1"}, {"epoch": 1.5}, {"positions": None}, {"skipped": 1}, {"num_tokens": True}, {"expert_load": ["x"]}],
    ids=str,
)
def test_a_figure_of_another_type_makes_no_row(change):
    assert StepRow.from_json(row_of(1).to_json()) is not None
    assert StepRow.from_json(row_of(1).to_json() | change) is None


def test_a_row_that_lacks_a_figure_and_a_lost_one_are_none():
    values = row_of(1).to_json()
    for key in ("epoch", "loss", "loss_sum", "num_tokens", "grad_norm", "lr", "samples", "positions"):
        assert StepRow.from_json({k: v for k, v in values.items() if k != key}) is None
    assert StepRow.from_json({"step": 3, "lost": True}) is None


def test_what_a_rebuilt_row_has_is_what_a_row_has():
    """Whoever adds a field decides whether the ledger keeps it: else it is null in a rebuilt row, or not there."""
    ledger = Ledger()
    full = row_of(1, aux_loss=0.0, tokens=9, micro_batches=1, padding_share=0.0, step_s=1.0, tokens_per_s=9.0)
    full.loss_scale, full.skipped, full.spike = 2.0, True, 11.0
    full.eval_loss = full.eval_perplexity = full.eval_bits_per_byte = 1.0
    full.eval_sources = {"chats": 1.0}
    full.expert_load, full.expert_max_share, full.max_expert_share = [1.0], [1.0], 1.0
    full.rebuilt = True
    assert all(getattr(full, field.name) is not None for field in fields(StepRow)), "a new field belongs here too"
    ledger.add(full, b"line")
    rebuilt = StepRow.from_json(ledger.row(1))
    lost = {name for name, value in full.to_json().items() if getattr(rebuilt, name) != value}
    assert lost == {
        *("aux_loss", "tokens", "micro_batches", "padding_share", "step_s", "tokens_per_s"),
        *("loss_scale", "expert_load", "expert_max_share", "max_expert_share"),
    }


def test_routing_is_divided_once():
    row = row_of(1)
    load = np.array([[3.0, 1.0], [2.0, 2.0]])  # of two layers: how many of 4 choices went to which of two experts
    row.add_routing({"aux_loss": (np.array(6.0), 3.0), "expert_load": (load, 4.0)})
    assert (row.aux_loss, row.expert_load) == (2.0, [0.625, 0.375])
    assert (row.expert_max_share, row.max_expert_share) == ([0.75, 0.5], 0.75)
