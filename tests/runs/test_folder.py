"""What is said of data that a checkpoint was not trained with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pertoken.checkpoints.state import TrainerState
from pertoken.runs.folder import changed_data


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ({"a": "1", "b": "2"}, "its files come in another order"),
        ({"b": "2", "a": "1"}, "its tokenizer, its template or a setting of [data] changed"),
        ({"b": "2", "a": "3"}, "a changed"),
        (None, "a file, its tokenizer, its template or a setting of [data] changed"),  # kept by no earlier version
    ],
)
def test_what_is_said_of_changed_data_is_what_changed(before: dict[str, str] | None, said: str) -> None:
    files = {} if before is None else {"train": before}
    state = TrainerState(step=1, recipe={}, data={"train": "x"}, data_files=files, scaler={}, micro_batch_tokens=1)
    checkpoint: Any = SimpleNamespace(state=state, folder=Path("step-1"))
    told = changed_data(checkpoint, {"train": ("y", "z")}, {"train": {"b": "2", "a": "1"}})
    assert told == f"the training data is not what step-1 was trained with: {said}"
