"""What a tokenizer's description says of its tokens: how many bytes of the text each stands for, and which one stands
for what it does not know."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["ids_of", "unknown_id_of", "widths_of"]


def ids_of(backend: Any) -> list[int]:
    """All ids, of added tokens too."""
    return [int(i) for i in backend.get_vocab(with_added_tokens=True).values()]


def unknown_id_of(backend: Any, spec: dict[str, Any]) -> int | None:
    """The token for what the vocabulary lacks; None where there is none, or bytes are tokens: it lacks nothing then."""
    model = spec["model"]
    if model.get("byte_fallback") or (model["type"] == "BPE" and _has_all_bytes(model)):
        return None
    if model.get("unk_token") is not None:
        token_id: int | None = backend.token_to_id(model["unk_token"])
        return token_id
    unknown: int | None = model.get("unk_id")
    return unknown


def _has_all_bytes(model: dict[str, Any]) -> bool:
    from tokenizers import pre_tokenizers

    return bool(set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys())


def widths_of(backend: Any, spec: dict[str, Any]) -> np.ndarray | None:
    """[V] int64, how many bytes of the text each token stands for; None unless the tokenizer is byte-level throughout,
    or of characters.

    That is: byte-pair encoding over the 256 signs of the byte-level alphabet, each a token, behind a pre-tokenizer that
    only splits. Then tokens take disjoint pieces of the text, in order, of exactly these widths, except that an added
    token may swallow spaces beside it. A normalizer (NFC, as Qwen's) may rewrite text, but not ASCII.
    """
    if (of_characters := _character_widths(spec)) is not None:
        return of_characters
    model, first = spec["model"], spec["pre_tokenizer"] or {}
    steps = (first["pretokenizers"] or [{}]) if first.get("type") == "Sequence" else [first]
    splits = all(step["type"] == "Digits" or step.get("behavior", "Removed") != "Removed" for step in steps[:-1])
    if (
        (spec["normalizer"] or {"type": "NFC"})["type"] != "NFC"
        or model["type"] != "BPE"
        or any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        or not _has_all_bytes(model)
        or steps[-1].get("type") != "ByteLevel"
        or steps[-1]["add_prefix_space"]
        or not splits
    ):
        return None
    widths = np.zeros(max(ids_of(backend)) + 1, dtype=np.int64)
    widths[list(model["vocab"].values())] = [len(token) for token in model["vocab"]]
    for token in spec["added_tokens"]:
        widths[token["id"]] = len(token["content"].encode())
    return widths


def _character_widths(spec: dict[str, Any]) -> np.ndarray | None:
    """As `widths_of`, of byte-pair encoding without a merge: a token is a character. None for any other tokenizer.

    The token for unknown characters counts as wider than any character, so a text that has one is not tiled.
    """
    model, added = spec["model"], spec["added_tokens"]
    names = {token["content"] for token in added}
    if (
        spec["normalizer"]
        or spec["pre_tokenizer"]
        or model["type"] != "BPE"
        or any(model.get(key) for key in ("merges", "dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        or any(model.get(key) for key in ("byte_fallback", "fuse_unk", "ignore_merges"))
        or any(token["lstrip"] or token["rstrip"] or token["normalized"] for token in added)
        or any(len(token) != 1 for token in model["vocab"].keys() - names)
        or len((model["unk_token"] or "").encode()) <= 4
    ):
        return None
    vocabulary = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    widths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    widths[list(vocabulary.values())] = [len(token.encode()) for token in vocabulary]
    return widths
