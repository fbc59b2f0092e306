"""A long text is encoded in pieces, and what comes out is what comes out of it whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import pertoken.data.files.long_text
import pertoken.data.tokens.cuts
import pertoken.data.tokens.encode
from pertoken.data.files.long_text import BOM, LongText
from pertoken.data.tokens.cuts import NoCut
from pertoken.data.tokens.encode import Encoder, TextWithSpans
from pertoken.data.tokens.tokenizer import load_tokenizer

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


class _Wrapped:
    """What an Encoder needs of a tokenizer."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend
        self.all_special_ids: list[int] = []
        self.added_tokens_decoder = backend.get_added_tokens_decoder()


def _byte_level(pattern: str | None) -> Any:
    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2(folder: Path) -> Tokenizer:
    backend = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


CHANGES: dict[str, Callable[[Tokenizer], None]] = {
    "ours": lambda backend: None,
    "qwen": lambda backend: _set(backend, _byte_level(QWEN), normalizers.NFC()),
    "llama3": lambda backend: _set(backend, _byte_level(LLAMA3)),
    "gpt2 pattern": lambda backend: _set(backend, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "one word": lambda backend: _set(backend, _byte_level(None)),
    "single digits": lambda backend: _set(
        backend,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "added": lambda backend: _add(backend, [AddedToken("the fox"), AddedToken("aaab", normalized=False)]),
    "added nfc": lambda backend: _set(
        _add(backend, [AddedToken("x y"), AddedToken("fox.")]), _byte_level(QWEN), normalizers.NFC()
    ),
    "stripping": lambda backend: _add(backend, [AddedToken("<add>", lstrip=True, rstrip=True)]),
}


def _set(backend: Tokenizer, pre_tokenizer: Any, normalizer: Any = None) -> None:
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer


def _add(backend: Tokenizer, tokens: list[AddedToken]) -> Tokenizer:
    backend.add_tokens(tokens)
    return backend


@cache
def _encoder(folder: Path, change: str) -> Encoder:
    if change == "gpt2":
        return Encoder(_Wrapped(_gpt2(folder)))  # type: ignore[arg-type]
    tokenizer = load_tokenizer(folder)
    CHANGES[change](tokenizer.backend_tokenizer)
    return Encoder(tokenizer)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pertoken.data.tokens.cuts, "_PIECE_CHARS", 30)
    monkeypatch.setattr(pertoken.data.tokens.cuts, "_LONGEST_CHARS", 5000)
    monkeypatch.setattr(pertoken.data.tokens.cuts, "_LEAST_WINDOW", 64)
    _encoder.cache_clear()


_BITS = [
    *("The quick brown fox", " jumps", "the fox", "fox.", "x y", "I'll", "don't", "'s", "it’s", "ß", "Ünï", " "),
    *("\n", "\r\n", "\n\n  \n", "\t", "   ", "\u00a0", "\u3000", "\u200d", "\u0085", "\u180e", "。", "，", "...", "=>"),
    *(
        "今天天气很好",
        "カタカナ",
        "ひらが\u3099な",
        "한국어",
        "नमस्ते",
        "สวัสดี",
        "Да",
        "العربية",
        "e\u0301",
        "\u0301",
        "\u212b",
    ),
    *(
        "🙂",
        "👩‍🚀",
        "<|im_end|>",
        "<|endoftext|>",
        "<add>",
        "aaab",
        "ab",
        "a",
        "7",
        "12345",
        "٣",
        "Ⅷ",
        "_",
        "\u1e9b\u0323",
    ),
]
BITS = st.one_of(st.sampled_from(_BITS), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
TEXTS = st.lists(st.tuples(BITS, st.sampled_from([1, 1, 1, 2, 3, 30, 150])), min_size=1, max_size=14).map(
    lambda runs: "".join(bit * times for bit, times in runs)
)


@pytest.mark.parametrize("change", CHANGES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, edges=st.lists(st.floats(0, 1), max_size=6), append=st.sampled_from([None, 2]))
def test_the_pieces_of_any_text_are_the_whole(
    bpe_folder: Path, change: str, text: str, edges: list[float], append: int | None
) -> None:
    _compare(_encoder(bpe_folder, change), text, edges, append)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, edges=st.lists(st.floats(0, 1), max_size=6))
def test_the_pieces_of_any_text_in_characters_are_the_whole(char_folder: Path, text: str, edges: list[float]) -> None:
    _compare(_encoder(char_folder, "ours"), text, edges, 2)


@pytest.mark.parametrize("name", ["minimind", "gpt2"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, edges=st.lists(st.floats(0, 1), max_size=6))
def test_the_pieces_of_any_text_are_the_whole_for_known_tokenizers(
    shared_data: Path, name: str, text: str, edges: list[float]
) -> None:
    _compare(_encoder(shared_data / "tokenizer" / name, "gpt2" if name == "gpt2" else "ours"), text, edges, None)


@pytest.mark.parametrize("change", CHANGES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, edges=st.tuples(st.floats(0, 1), st.floats(0, 1)), block=st.integers(1, 90), bom=st.booleans())
def test_the_pieces_of_any_file_are_those_of_its_text(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bpe_folder: Path,
    change: str,
    text: str,
    edges: tuple[float, float],
    block: int,
    bom: bool,
) -> None:
    """However its blocks end: within a character, a line end, a word, an added token."""
    monkeypatch.setattr(pertoken.data.files.long_text, "_BLOCK_BYTES", block)
    _compare_file(_encoder(bpe_folder, change), tmp_path / "a.txt", text, edges, bom)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, edges=st.tuples(st.floats(0, 1), st.floats(0, 1)), block=st.integers(1, 90))
def test_the_pieces_of_any_file_in_characters_are_those_of_its_text(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    char_folder: Path,
    text: str,
    edges: tuple[float, float],
    block: int,
) -> None:
    monkeypatch.setattr(pertoken.data.files.long_text, "_BLOCK_BYTES", block)
    _compare_file(_encoder(char_folder, "ours"), tmp_path / "a.txt", text, edges, bom=False)


@pytest.mark.parametrize("change", ["added", "added nfc", "qwen", "one word", "stripping"])
@pytest.mark.parametrize(
    "text", ["the fox" * 20, "x y" * 60, "aaab" * 80, "ab" * 200 + "é" + "ab" * 200, "<add>  a" * 9]
)
def test_a_file_is_cut_like_its_text_however_its_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe_folder: Path, change: str, text: str
) -> None:
    """A place may be as far from a piece's start as one is looked for, and an added token reach further."""
    monkeypatch.setattr(pertoken.data.tokens.cuts, "_LONGEST_CHARS", 40 if " " in text else 300)
    encoder = _encoder(bpe_folder, change)
    for block in range(3, 60):
        monkeypatch.setattr(pertoken.data.files.long_text, "_BLOCK_BYTES", block)
        _compare_file(encoder, tmp_path / "a.txt", text, (0, 1), bom=False)


def _compare_file(encoder: Encoder, path: Path, text: str, edges: tuple[float, float], bom: bool) -> None:
    """Piece by piece; that the pieces of a text are the whole is tested above."""
    raw = (BOM if bom or text.startswith("\ufeff") else b"") + text.encode()
    path.write_bytes(raw)
    start, stop = sorted(int(edge * len(text)) for edge in edges)
    for one, other in ((start, stop), (0, len(text))):
        long, short = LongText(str(path), sha256(raw).hexdigest(), one, other), text[one:other]
        found, expected = (_pieces_or_not(encoder, text) for text in (long, TextWithSpans(short, [(0, len(short))])))
        assert found == expected


def _pieces_or_not(encoder: Encoder, text: TextWithSpans | LongText) -> str | list[list[list[int]]]:
    try:
        pieces = list(encoder.pieces(text, append=2))
    except NoCut as error:
        return str(error)
    return [[piece.tokens.tolist(), piece.supervised.tolist(), piece.num_bytes.tolist()] for piece in pieces]


def _compare(encoder: Encoder, text: str, edges: list[float], append: int | None) -> int:
    places = sorted({int(edge * len(text)) for edge in edges})
    marked = TextWithSpans(text, list(zip(places[::2], places[1::2], strict=False)))
    try:
        pieces = list(encoder.pieces(marked, append=append))
    except NoCut:
        assert len(text) > 5000 or encoder._cuts is None
        return 0
    (whole,) = encoder.encode([marked], append=append)
    for name in ("tokens", "supervised", "num_bytes"):
        put_together = np.concatenate([getattr(piece, name) for piece in pieces])
        assert put_together.dtype == getattr(whole, name).dtype
        np.testing.assert_array_equal(put_together, getattr(whole, name), err_msg=name)
    return len(pieces)


WORDS = "The quick brown fox. "
CUT: dict[str, set[str]] = {  # a text: the tokenizers that are not known to cut it
    WORDS * 40: {"added nfc"},
    "\n".join(["Zeile"] * 100): set(),
    "\r\n".join(["line"] * 100): set(),
    "今天天气很好，我们去公园吧。" * 40: set(),
    "a" * 2000: set(),
    "xyzzy" * 400: set(),
    "天" * 2000: {"qwen", "added nfc"},
    "1234567890" * 200: {"llama3"},
    "".join(f"{i},{i * 7 % 1000}.5\n" for i in range(200)): set(),
    "gattaca" * 100 + "é" + "gattaca" * 200: set(),
}


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "stripping"])
@pytest.mark.parametrize("text", CUT, ids=range(len(CUT)))
def test_texts_are_cut_between_words_and_within_them(bpe_folder: Path, change: str, text: str) -> None:
    pieces = _compare(_encoder(bpe_folder, change), text, [0.2, 0.4], 2)
    assert pieces == 1 if change in CUT[text] else pieces > 3


def test_a_long_text_without_a_place_to_cut_is_refused_with_its_place(
    bpe_folder: Path,
) -> None:
    encoder = _encoder(bpe_folder, "ours")
    text = "word " * 50 + " " * 6000 + "end"
    with pytest.raises(NoCut, match=r"5,000 characters after character 2\d\d without a known place to cut"):
        encoder.pieces(TextWithSpans(text, [(0, len(text))]))
    assert len(list(encoder.pieces(TextWithSpans("word " * 50 + " " * 4900, [])))) > 1


def test_an_unknown_tokenizer_encodes_a_text_whole_up_to_a_length(
    bpe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    tokenizer.backend_tokenizer.pre_tokenizer = _byte_level(r"\p{L}+(?=\s)|.")
    encoder = Encoder(tokenizer)
    monkeypatch.setattr(pertoken.data.tokens.encode, "_WHOLE_CHARS", 100)
    assert len(list(encoder.pieces(TextWithSpans("a" * 100, [])))) == 1
    with pytest.raises(NoCut, match="101 characters, more than the 100 that can be encoded at once"):
        encoder.pieces(TextWithSpans("a" * 101, []))


@pytest.mark.parametrize("without", [r"|\s+", r"| ?[^\s\p{L}\p{N}]+[\r\n]*", r"|[^\r\n\p{L}\p{N}]?\p{L}+"])
def test_a_pattern_that_leaves_characters_over_is_not_cut_at(bpe_folder: Path, without: str) -> None:
    """What no alternative matches is one word with whatever stands beside it: "12 34" where nothing matches a space."""
    tokenizer = load_tokenizer(bpe_folder)
    pattern = QWEN.removesuffix(without) if without == r"|\s+" else QWEN.replace(without, "")
    assert pattern != QWEN
    _set(tokenizer.backend_tokenizer, _byte_level(pattern))
    assert Encoder(tokenizer)._cuts is None
