"""The tokens of a row as `tokenizers` and transformers give them, against those of its samples."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from pertoken.data.tokens.control import ControlTokens
from pertoken.recipe.data import DataConfig

__all__ = ["bos_id", "difference", "document_difference"]


def document_difference(got: np.ndarray, text: str, data: DataConfig, tokenizer: Any) -> str | None:
    """What is wrong with the tokens of a whole document, in words; None where nothing is.

    It begins with the BOS that the tokenizer gives to a prompt, and ends with the eos token, each of them once.
    """
    bos, eos = bos_id(tokenizer), int(tokenizer.eos_token_id)
    own = _encoded(text, tokenizer)
    first = [] if bos is None or own[:1] == [bos] else [bos]
    expected = [*first, *own, *([] if own[-1:] == [eos] else [eos])]
    inside = text.removeprefix(_name(bos, tokenizer)).removesuffix(_name(eos, tokenizer))
    if data.special_in_text != "special" and _without(inside, data, tokenizer) != inside:
        return _typed_difference(got, inside, [*([] if bos is None else [bos]), eos], tokenizer)
    return difference(got, np.array(expected))


def bos_id(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a prompt; None where it puts none there."""
    ids: list[int] = tokenizer.encode("a")
    return ids[0] if ids != _encoded("a", tokenizer) and ids[0] != _encoded("a", tokenizer)[0] else None


def _typed_difference(
    got: np.ndarray, text: str, control: list[int], tokenizer: Any, *, cut: bool = False
) -> str | None:
    """Control tokens that are typed in the row are text: read back the tokens are `text`, and special are only those
    that `control` has, in this order. With `cut` both may go on."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    found, expected = ([int(i) for i in ids if int(i) in special] for ids in (got, control))
    if found != (expected[: len(found)] if cut else expected):
        return f"its control tokens are {found}, the row's are {expected}"
    read_back = tokenizer.decode(got.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    left, right = ("".join(part.split()).strip("\ufffd") for part in (read_back, text))
    same = right.startswith(left) if cut else right in left
    return None if same else "read back, the tokens are not the row's text"


def _without(text: str, data: DataConfig, tokenizer: Any) -> str:
    """The text without control tokens, as they stand in JSON too."""
    for name in ControlTokens.of(tokenizer, data.add_tokens).names:
        text = text.replace(json.dumps(name, ensure_ascii=False)[1:-1], "").replace(name, "")
    return text


def _name(token_id: int | None, tokenizer: Any) -> str:
    return "" if token_id is None else str(tokenizer.convert_ids_to_tokens(token_id))


def _encoded(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def difference(got: np.ndarray, expected: np.ndarray) -> str | None:
    """Where tokens are not as expected, in words; None where they are."""
    if len(got) != len(expected):
        return f"{len(got)} tokens, the row has {len(expected)}"
    apart = np.flatnonzero(got != expected)
    return f"token {int(apart[0])} is {got[apart[0]]}, the row's is {expected[apart[0]]}" if len(apart) else None
