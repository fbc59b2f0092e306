"""What a validation error means, in the words of whoever wrote the recipe."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator

from pydantic import BaseModel, ValidationError

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


def explain(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """One line per problem of validating a `root`: dotted key, value, remedy; for an unknown key the nearest known."""
    keys = _all_keys(root)
    sections = [name for name in root.model_fields if any(key.startswith(f"{name}.") for key in keys)]
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        key = one_line(key if len(key) <= _KEY_CHARS else key[:_KEY_CHARS] + "...")
        kind, context, value = problem["type"], problem.get("ctx", {}), problem.get("input")
        what = f"{key}={shown(value)}"
        match kind:
            case "extra_forbidden":
                # adapter.r would be near to any other key of a letter or two
                leaf = {short: k for k in keys if len(short := k.rpartition(".")[2]) > 1}
                near = difflib.get_close_matches(key, keys, 1, 0.75) or [
                    leaf[k] for k in difflib.get_close_matches(key.rpartition(".")[2], leaf, 1, 0.6)
                ]
                hint = f"did you mean {near[0]}?" if near else "see the README for the keys there are"
                yield f"{key}: unknown key; {hint}"
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
                yield f"{what}: must be a section, [{key}]"
            case _:
                yield f"{what}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
