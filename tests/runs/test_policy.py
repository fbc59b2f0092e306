"""What becomes of a run after a step, decided without a run."""

from __future__ import annotations

import numpy as np
import pytest

from pertoken.data.batch.order import Step
from pertoken.runs.policy import Decision, Requests, count_evaluations, decide, is_due, is_out_of_patience


def step(number: int, *, last_of_epoch: bool = False) -> Step:
    return Step(number, 1, np.arange(2), 0, 2, last_of_epoch)


@pytest.mark.parametrize(
    ("number", "ends_epoch", "interval", "due"),
    [(4, False, 2, True), (5, True, 2, False), (5, True, None, True), (5, False, None, False), (1, False, 1, True)],
)
def test_what_is_due_goes_by_its_interval_or_by_epochs(number, ends_epoch, interval, due):
    assert is_due(step(number, last_of_epoch=ends_epoch), interval) == due


@pytest.mark.parametrize(
    ("number", "requests", "stops"),
    [
        (5, Requests(), None),
        (9, Requests(), "done"),
        (5, Requests(signal_number=2), "signal"),
        (5, Requests(time_is_up=True), "time"),
        (5, Requests(signal_number=2, time_is_up=True), "signal"),
        (9, Requests(signal_number=2, time_is_up=True), "done"),
        (9, Requests(listener_failed=True), "listener"),
        (5, Requests(signal_number=2, listener_failed=True), "listener"),
        (5, Requests(save=True), None),
    ],
)
def test_why_a_run_stops_and_that_it_saves_then(number, requests, stops):
    decision = decide(step(number), requests, total_steps=9, save_interval=100)
    assert decision == Decision(save=stops is not None or requests.save, stops=stops)


@pytest.mark.parametrize(
    ("number", "requests", "stops"),
    [
        (5, Requests(), "early"),
        (9, Requests(), "done"),
        (5, Requests(signal_number=2, time_is_up=True), "early"),
        (5, Requests(listener_failed=True), "listener"),
    ],
)
def test_a_run_out_of_patience_is_finished_and_saved(number, requests, stops):
    decision = decide(step(number), requests, total_steps=9, save_interval=100, out_of_patience=True)
    assert decision == Decision(save=True, stops=stops)


@pytest.mark.parametrize(("patience", "evals", "out"), [(None, 99, False), (3, 2, False), (3, 3, True), (1, 0, False)])
def test_patience_counts_evaluations_in_a_row(patience, evals, out):
    assert is_out_of_patience(patience, evals) == out


@pytest.mark.parametrize(
    ("total", "interval", "count"), [(9, 3, 3), (10, 3, 4), (10, None, 2), (5, None, 1), (3, 9, 1)]
)
def test_how_often_a_run_evaluates(total, interval, count):
    assert count_evaluations(total, interval, steps_per_epoch=5) == count


def test_a_save_is_made_where_one_is_due_or_the_evaluation_is_the_best():
    assert decide(step(4), Requests(), total_steps=9, save_interval=2).save
    assert decide(step(5), Requests(), total_steps=9, save_interval=2, is_best=True).save
    assert not decide(step(5), Requests(), total_steps=9, save_interval=2).save
