"""`self_instruct`: an instruction and a list of one instance, {input, output}, as self-instruct's seed tasks have."""

from __future__ import annotations

from pertoken.data.formats.conversation import Conversation
from pertoken.data.formats.format import Fields, Format
from pertoken.data.formats.problem import RowProblem, kind_of
from pertoken.data.formats.turns import answered

__all__ = ["SELF_INSTRUCT"]


def _read(fields: Fields) -> Conversation:
    instruction, instances = fields.need_text("instruction"), fields.need("instances")
    field = fields.name("instances")
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances):
        raise RowProblem(field, f"{kind_of(instances)} found; give a list of objects with input and output")
    if len(instances) != 1:
        raise RowProblem(field, f"{len(instances)} instances in one row; write a row for each, one instance a row")
    instance = {key: value for key, value in instances[0].items() if value is not None}
    for key, value in instance.items():
        if key not in ("input", "output"):
            raise RowProblem(f"{field}[0].{key}", "a key of an instance that nothing would be made of; remove it")
        if not isinstance(value, str):
            raise RowProblem(f"{field}[0].{key}", f"{kind_of(value)} found; give text")
    if "output" not in instance:
        raise RowProblem(f"{field}[0].output", "missing; give the answer, or remove the row")
    question = "\n".join(text for text in (instruction, instance.get("input", "")) if text)
    return answered(fields, question, instance["output"])


SELF_INSTRUCT = Format("self_instruct", "conversation", ("instruction", "instances"), _read, ("system",))
