"""What a `config.json` asks for and the decoder lacks."""

from __future__ import annotations

from typing import Any, NoReturn

from pertoken.errors import ModelError
from pertoken.text import shown

__all__ = ["NotCovered", "refuse"]


class NotCovered(ModelError):
    """An architecture that the decoder lacks. Transformers may have it (`pertoken.folders.open`)."""

    def __init__(self, message: str, model_type: object) -> None:
        super().__init__(message)
        self.model_type = model_type


def refuse(values: dict[str, Any], key: str, reason: str) -> NoReturn:
    """Raise NotCovered for a key of a configuration."""
    raise NotCovered(f"{key}={shown(values[key])}: {reason}", values["model_type"])
