"""What a validation error means, in the words of whoever wrote the recipe."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator

from pydantic import BaseModel, ValidationError

from pertoken.recipe.peers import PEERS, said_of
from pertoken.text import one_line, shown

__all__ = ["explain"]

_KEY_CHARS = 80


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for option in (field.annotation, *typing.get_args(field.annotation)):  # a section may be left out: X | None
            if isinstance(option, type) and issubclass(option, BaseModel):
                keys += _all_keys(option, f"{prefix}{name}.")
    return keys


def _peer_name(key: str) -> str:
    return key.rpartition(".")[2].replace("-", "_")


def _hint(key: str, keys: list[str]) -> str:
    """What an unknown key may have been meant for: what other trainers call so, else the nearest of ours."""
    leaf = {k.rpartition(".")[2]: k for k in keys}
    in_wrong_section = "." in key and key.rpartition(".")[2] in leaf
    if not in_wrong_section and (said := said_of(_peer_name(key))) is not None:
        return said
    long_enough = {short: k for short, k in leaf.items() if len(short) > 1}  # adapter.r is near to any short key
    near = difflib.get_close_matches(key, keys, 1, 0.75) or [
        leaf[k] for k in difflib.get_close_matches(key.rpartition(".")[2], long_enough, 1, 0.6)
    ]
    return f"did you mean {near[0]}?" if near else "see the README for the keys there are"


def explain(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """One line per problem of validating a `root`: dotted key, value, remedy; for an unknown key
    what it is called here, or the nearest known."""
    keys = _all_keys(root)
    sections = [name for name in root.model_fields if any(key.startswith(f"{name}.") for key in keys)]
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        key = one_line(key if len(key) <= _KEY_CHARS else key[:_KEY_CHARS] + "...")
        kind, context, value = problem["type"], problem.get("ctx", {}), problem.get("input")
        what = f"{key}={shown(value)}"
        match kind:
            case "extra_forbidden":
                inside = value if isinstance(value, dict) and key not in PEERS else {}  # a section that there is not
                if any(_peer_name(k) in PEERS for k in inside):
                    yield from (f"{key}.{k}: unknown key; {_hint(f'{key}.{k}', keys)}" for k in inside)
                else:
                    yield f"{key}: unknown key; {_hint(key, keys)}"
            case "missing":
                yield f"{key}: missing; add it to the recipe or pass {key}=..."
            case "value_error":
                said = str(context["error"])
                yield said if key in ("", *sections) else f"{what}: {said}"  # a section's says its own keys
            case "literal_error":
                yield f"{what}: must be one of {context['expected']}"
            case "greater_than_equal":
                yield f"{what}: must be at least {context['ge']}"
            case "greater_than":
                yield f"{what}: must be more than {context['gt']}"
            case "less_than_equal":
                yield f"{what}: must be at most {context['le']}"
            case "less_than":
                yield f"{what}: must be less than {context['lt']}"
            case "int_type" | "int_from_float":
                yield f"{what}: must be a whole number, written without quotes or a point"
            case "float_type" | "finite_number":
                yield f"{what}: must be a finite number, written without quotes"
            case "bool_type":
                yield f"{what}: must be true or false, written without quotes"
            case "string_type":
                yield f"{what}: must be text, written in quotes"
            case "too_short" | "string_too_short":
                yield f"{what}: must not be empty"
            case "model_type" | "model_attributes_type":
                theirs = said_of(key) if isinstance(value, str) else None  # such as model = "name"
                if theirs is not None:
                    yield f"[{key}] is a section, not {shown(value)}; {theirs}"
                else:
                    yield f"{what}: must be a section, [{key}]"
            case _:
                yield f"{what}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
