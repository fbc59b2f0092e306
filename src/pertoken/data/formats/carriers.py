"""Keys that carry training content, or its weight, in some format: read by the row's format, or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from pertoken.data.formats.problem import RowProblem

__all__ = ["refuse_message_keys", "refuse_other_training", "refuse_row_keys"]

_DPO = "preference data (DPO): chosen and rejected answers"
_KTO = "preference data (KTO): whether the answer is wanted"
_TRAINS = "pertoken trains on answers to be imitated"
_NO_MEDIA = "images, video or sound; pertoken trains on text alone: remove the row"
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_WEIGHTS = {
    **dict.fromkeys(("weight", "loss_weight"), "how much the row counts"),
    **dict.fromkeys(("loss", "train", "train_on_turn"), "whether it is learned"),
    **dict.fromkeys(("mask", "loss_mask", "train_detail"), "which parts are learned"),
}
_CONTENT = {
    "system": "the system prompt",
    "history": "the turns before",
    "input": "a part of the question",
    "context": "a part of the question",
    **dict.fromkeys(("tools", "functions"), "the tools that may be called"),
    **dict.fromkeys(("tool_calls", "function_call"), "a call of a tool"),
    **dict.fromkeys(("reasoning", "reasoning_content", "thinking"), "the reasoning before the answer"),
}
_OF_MESSAGES = {
    **dict.fromkeys(("train_on_turn", "mask", "loss_mask"), "what of the message is learned"),
    "train_detail": "which characters are learned",
    "prefix": "an answer that is only continued",
    "refusal": "the text of a refusal",
    **{key: what for key, what in _CONTENT.items() if key in ("system", "history", "input", "context")},
}


def refuse_other_training(
    row: dict[str, Any], keys: Iterable[str], ignored: Collection[str], *, is_text: bool = False
) -> None:
    """Raise RowProblem where one of the row's `keys` makes it preference data, or holds images or sound.

    A recipe may ignore a preference; a row with images asks about what is in them.
    """
    for key in keys:
        if not _says(row, key):
            continue
        if key in _MEDIA:
            raise RowProblem(key, _NO_MEDIA)
        if is_text or key in ignored:
            continue
        if key.startswith(("chosen", "rejected")):
            keep = 'data.columns = {completion = "chosen"} with data.ignore = ["rejected"] trains on the chosen ones'
            raise RowProblem(key, f"{_DPO}; {_TRAINS}: {keep if key in ('chosen', 'rejected') else 'remove the row'}")
        if key == "kto_tag" or (key == "label" and _is_truth(row[key])):
            raise RowProblem(
                key, f'{_KTO}; {_TRAINS}: leave only the wanted ones in the file, then set data.ignore = ["{key}"]'
            )


def refuse_row_keys(row: dict[str, Any], unread: Iterable[str], format: str, *, is_text: bool) -> None:
    """Raise RowProblem where an unread key of a row would change what is learned."""
    for key in unread:
        what = _WEIGHTS.get(key) or (None if is_text else _CONTENT.get(key))
        if what is None or not _says(row, key) or (key in _WEIGHTS and row[key] == 1):
            continue
        where = f"; put {key} on the messages" if key in ("weight", "loss_weight", "loss", "train") else ""
        raise RowProblem(key, f"{what}, which the format {format} does not read{where}; {_remedy(key)}")


def refuse_message_keys(message: dict[str, Any], field: str) -> None:
    """Raise RowProblem where a message has content, or a choice of what is learned, that nothing would be made of."""
    for key in message:
        if key in _MEDIA and _says(message, key):
            raise RowProblem(f"{field}.{key}", _NO_MEDIA)
        if key in _OF_MESSAGES and _says(message, key):
            raise RowProblem(f"{field}.{key}", f"{_OF_MESSAGES[key]}, which pertoken does not read; remove the key")
        if key in ("chosen", "rejected") and _says(message, key):
            raise RowProblem(f"{field}.{key}", f"{_DPO}; {_TRAINS}; remove the row")
        if key == "value":
            raise RowProblem(f"{field}.value", "content is given too; keep one of the two")


def _says(row: dict[str, Any], key: str) -> bool:
    """Whether there is anything under the key: a false or a zero is something."""
    value = row[key]
    return value is not None and value not in ("", [], {})


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or value in (0, 1, "0", "1") or str(value).lower() in ("true", "false")


def _remedy(key: str) -> str:
    return f'remove it, or set data.ignore = ["{key}"] to train without it'
