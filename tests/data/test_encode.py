"""Byte-level tokenizers, and those of characters, are encoded without offsets; the same must come out as with them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from pertoken.data.tokens.encode import Encoded, Encoder, TextWithSpans
from pertoken.data.tokens.tokenizer import load_tokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_KNOWN = ["<|im_end|>", " <add> ", "e\u0301", "\u212b", " the fox\n\n", "🙂", "👩‍🚀"]
PIECES = st.lists(st.one_of(TEXTS, st.sampled_from(_KNOWN)), max_size=6)


@cache
def _tokenizer(folder: Path, change: str) -> Any:
    tokenizer = load_tokenizer(folder)
    backend = tokenizer.backend_tokenizer
    backend.add_tokens([AddedToken("<add>", lstrip=change == "strips", rstrip=change == "strips")])
    if change == "nfc":
        backend.normalizer = normalizers.NFC()
    elif change == "lowercase":
        backend.normalizer = normalizers.Lowercase()
    elif change == "prefix_space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "removes":
        removed = pre_tokenizers.Split(Regex("o"), behavior="removed")
        backend.pre_tokenizer = pre_tokenizers.Sequence([removed, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif change == "no_bytes":  # a vocabulary without most signs, so that characters vanish
        backend.model = models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])
        backend.decoder = decoders.ByteLevel()
    return tokenizer


def _with_offsets(encoder: Encoder, marked: TextWithSpans, append: int | None) -> Encoded:
    return encoder._by_offsets(marked, encoder._with_offsets([marked.text])[0]).framed(None, append)


WIDTHS_HOLD = {"plain": True, "strips": True, "nfc": True, "lowercase": False, "prefix_space": False}
WIDTHS_HOLD |= {"removes": False, "no_bytes": False}


@pytest.mark.parametrize("change", WIDTHS_HOLD)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=PIECES, cuts=st.lists(st.integers(0, 60), max_size=6), append=st.sampled_from([None, 2]))
def test_tokens_and_their_places_are_those_that_offsets_give(
    bpe_folder: Path, change: str, pieces: list[str], cuts: list[int], append: int | None
) -> None:
    _compare(Encoder(_tokenizer(bpe_folder, change)), WIDTHS_HOLD[change], pieces, cuts, append)


OF_CHARACTERS = {"plain": True, "strips": False, "nfc": False, "lowercase": False, "fuse_unk": False, "merges": False}


@cache
def _of_characters(folder: Path, change: str) -> Any:
    tokenizer = load_tokenizer(folder)
    backend = tokenizer.backend_tokenizer
    if change == "strips":
        backend.add_tokens([AddedToken("<add>", lstrip=True)])
    elif change == "nfc":
        backend.normalizer = normalizers.NFC()
    elif change == "lowercase":
        backend.normalizer = normalizers.Lowercase()
    elif change in ("fuse_unk", "merges"):
        merges = {"merges": [("a", "b")]} if change == "merges" else {"merges": [], "fuse_unk": True}
        backend.model = models.BPE(
            vocab={"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}, unk_token="<|endoftext|>", **merges
        )
    return tokenizer


@pytest.mark.parametrize("change", OF_CHARACTERS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=PIECES, cuts=st.lists(st.integers(0, 60), max_size=6), append=st.sampled_from([None, 2]))
def test_characters_and_their_places_are_those_that_offsets_give(
    char_folder: Path, change: str, pieces: list[str], cuts: list[int], append: int | None
) -> None:
    _compare(Encoder(_of_characters(char_folder, change)), OF_CHARACTERS[change], pieces, cuts, append)


def _compare(encoder: Encoder, has_widths: bool, pieces: list[str], cuts: list[int], append: int | None) -> None:
    assert (encoder._widths is not None) is has_widths
    text = "".join(pieces)
    edges = sorted({min(cut, len(text)) for cut in cuts})
    marked = TextWithSpans(text, list(zip(edges[::2], edges[1::2], strict=False)))
    (quick,) = encoder.encode([marked], append=append)
    slow = _with_offsets(encoder, marked, append)
    for name in ("tokens", "supervised", "num_bytes"):
        left, right = getattr(quick, name), getattr(slow, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right, err_msg=name)


@pytest.mark.parametrize(("text", "change"), [("a 🙂 é fox" * 9, "plain"), ("a fox <|im_end|>", "plain"), ("a", "nfc")])
def test_a_byte_level_text_is_placed_without_offsets(
    bpe_folder: Path, text: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(_tokenizer(bpe_folder, change))
    monkeypatch.setattr(encoder, "_with_offsets", None)  # to ask for them would fail
    (encoded,) = encoder.encode([TextWithSpans(text, [(0, len(text))])])
    assert encoded.num_bytes.sum() == len(text.replace("<|im_end|>", "").encode())


@pytest.mark.parametrize("name", ["minimind"])
def test_known_tokenizers_are_byte_level(shared_data: Path, name: str) -> None:
    folder = shared_data / "tokenizer" / name
    assert Encoder(load_tokenizer(folder))._widths is not None
