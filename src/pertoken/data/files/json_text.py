"""JSON as it is meant: strict about what other readers pass over or change without a word."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

from pertoken.text import shown

__all__ = ["parse_json"]


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, saying where, for anything that is not JSON or not Unicode text, for
    a key that is twice in one object, and for numbers that Python cannot hold."""
    try:
        value = _DECODER.decode(text)
        if ("\\ud" in text or "\\uD" in text) and _has_surrogate(value):  # no character: no tokenizer can encode it
            raise _Refused("an unpaired surrogate escape (\\ud800 to \\udfff), which is no character")
    except json.JSONDecodeError as error:
        what = "a byte order mark" if text.startswith("\ufeff") else error.msg
        raise ValueError(f"not valid JSON ({what} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except _Refused:
        raise
    except ValueError:
        raise ValueError("a whole number of more digits than can be read") from None
    return value


class _Refused(ValueError):
    """JSON by the letter, perhaps, but nothing that can be meant."""


def _has_surrogate(value: Any) -> bool:
    """Without a copy of its texts, which may be long."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            if _SURROGATE.search(item):
                return True
        elif isinstance(item, dict):
            left += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            left += item
    return False


def _constant(name: str) -> None:
    raise _Refused(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Refused(f"the number {text[:30]} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _Refused(f"the key {shown(twice)} twice in one object, so it is not known which is meant")
    return value


_SURROGATE = re.compile("[\ud800-\udfff]")
_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float, object_pairs_hook=_object)
