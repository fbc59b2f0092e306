"""Keys that recipes of earlier versions have, under the names of today."""

from __future__ import annotations

from typing import Any

from pertoken.errors import RecipeError
from pertoken.text import shown

__all__ = ["without_old_keys"]


def without_old_keys(values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`values`, a nested dict, with what took their place, and a line about each. Raises RecipeError."""
    train = values.get("train")
    if not isinstance(train, dict) or "compile" not in train:
        return values, ()
    old = train["compile"]
    if "engine" in train:
        raise RecipeError(
            f"train.compile={shown(old)}: the old name of train.engine, which is given too; leave train.compile out"
        )
    engine = _engine(old, train.get("device", "auto"))
    renamed = {key: value for key, value in train.items() if key != "compile"} | {"engine": engine}
    remark = f'train.compile="{old}" is train.engine="{engine}" now; write that'
    return values | {"train": renamed}, (remark,)


def _engine(old: object, device: object) -> str:
    if old == "off":
        return "plain"
    if old == "auto":
        return "auto"
    if old != "on":
        raise RecipeError(
            f'train.compile={shown(old)}: must be "auto", "on" or "off"; or write train.engine, its name of today'
        )
    if device == "auto":
        import torch

        return "compile" if torch.cuda.is_available() else "cpu"
    return "compile" if str(device).startswith("cuda") else "cpu"
