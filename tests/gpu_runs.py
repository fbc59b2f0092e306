"""Runs on a GPU beside runs on a CPU: sizes that fit the GPU's kernels, and how their rows are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny import World, pertoken, rows_of

SIZES: dict[str, Any] = {
    "model__hidden_size": 128,
    "model__num_attention_heads": 4,
    "model__num_key_value_heads": 2,
    "model__head_dim": 64,
    "model__intermediate_size": 256,
}
SHORT: dict[str, Any] = {"train__max_steps": 8, "train__eval_interval": 8, "checkpoint__save_interval": 4}


def rows(world: World, tmp_path: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    """Those of a run of that name."""
    recipe = world.write_recipe(tmp_path / name, **(SIZES | SHORT | changes))
    code, out, err = pertoken("train", recipe)
    assert code == 0, out + err
    return rows_of(tmp_path / name)


def assert_close(
    mine: Sequence[dict[str, Any]],
    theirs: Sequence[dict[str, Any]],
    bound: float,
    figures: Sequence[str] = ("loss", "grad_norm"),
) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert a["num_tokens"] == b["num_tokens"]
        assert a["positions"] == b["positions"]
        for figure in figures:
            assert math.isclose(a[figure], b[figure], rel_tol=bound), (figure, a, b)
