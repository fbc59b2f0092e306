"""Documents begin with the BOS that the tokenizer gives to a prompt, and end with one EOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.data.tokens.tokenizer import bos_of
from pertoken.prove.expected import document_difference
from pertoken.recipe.data import DataConfig


@pytest.fixture
def with_bos(bpe_tokenizer: Any) -> Any:
    """A post-processor puts <|im_start|> before and <|im_end|>, which is the eos token, behind a text."""
    ids = [(name, bpe_tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")]
    bpe_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=ids
    )
    return bpe_tokenizer


def _build(path: Path, tokenizer: Any, stage: Any = "pretrain", **data: Any) -> Store:
    config = DataConfig.model_validate({"path": str(path), "store": str(path.parent / "cache"), **data})
    return build_store([str(path)], stage=stage, tokenizer=tokenizer, data=config)


def _tokens(store: Store) -> list[list[int]]:
    return [store[i].tokens.tolist() for i in range(len(store))]


def test_a_document_begins_with_it_once_and_ends_with_one_eos(write_jsonl: Any, with_bos: Any) -> None:
    bos, eos = 1, 2
    texts = ["the fox", "<|im_start|>the fox<|im_end|>", "the fox<|im_end|>"]
    path = write_jsonl("a.jsonl", [{"text": text} for text in texts])
    own = with_bos.encode("the fox", add_special_tokens=False)
    assert with_bos.encode("the fox") == [bos, *own, eos]
    for policy in ("text", "special", "error"):
        store = _build(path, with_bos, special_in_text=policy)
        assert _tokens(store) == [[bos, *own, eos]] * 3
        assert store.num_tokens.tolist() == [len(own) + 1] * 3, "the BOS is an input alone"
        assert store.num_bytes.tolist() == [7] * 3
        assert store.report.notes()[1] == "documents begin with <|im_start|>, as the tokenizer adds it"
        assert store.report.notes()[2].startswith("2 documents end with the eos token, so none is added")
        data = DataConfig.model_validate({"path": "x", "special_in_text": policy})
        assert [document_difference(store[i].tokens, text, data, with_bos) for i, text in enumerate(texts)] == [
            None
        ] * 3
        assert document_difference(store[0].tokens[1:], texts[0], data, with_bos) is not None


def test_of_samples_cut_from_a_document_the_first_has_it(write_jsonl: Any, with_bos: Any, monkeypatch: Any) -> None:
    path = write_jsonl("a.jsonl", [{"text": "the quick brown fox jumps over the lazy dog " * 30}])
    samples = _tokens(_build(path, with_bos, max_seq_len=32))
    assert len(samples) > 5
    assert [tokens.count(1) for tokens in samples] == [1, *[0] * (len(samples) - 1)]
    assert samples[0][0] == 1
    monkeypatch.setattr("pertoken.data.samples._CHUNK_CHARS", 100)
    monkeypatch.setattr("pertoken.data.tokens.cuts._PIECE_CHARS", 100)
    path = write_jsonl("b.jsonl", [{"text": "the quick brown fox jumps over the lazy dog " * 30}])
    assert _tokens(_build(path, with_bos, max_seq_len=32)) == samples, "a long one, in pieces"


def test_it_decides_the_samples_and_conversations_have_their_template_s(
    write_jsonl: Any, with_bos: Any, bpe_folder: Path
) -> None:
    from pertoken.data.tokens.tokenizer import load_tokenizer

    plain = load_tokenizer(bpe_folder)
    assert (bos_of(plain), bos_of(with_bos)) == (None, 1)
    path = write_jsonl("a.jsonl", [{"text": "the fox"}])
    with_it, without = _build(path, with_bos), _build(path, plain)
    assert set(with_it.fingerprints).isdisjoint(without.fingerprints)
    assert _tokens(without) == [_tokens(with_it)[0][1:]]
    assert without.report.notes() == ["formats: text (1 row)"]
    rows = [{"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]}]
    chats = write_jsonl("b.jsonl", rows)
    of_both = [_build(chats, tokenizer, "sft") for tokenizer in (with_bos, plain)]
    assert _tokens(of_both[0]) == _tokens(of_both[1])
    assert of_both[0].fingerprint == of_both[1].fingerprint


@pytest.mark.parametrize("folder", ["bpe_folder", "char_folder"])
def test_trained_tokenizers_add_none(request: pytest.FixtureRequest, folder: str) -> None:
    from pertoken.data.tokens.tokenizer import open_tokenizer

    assert bos_of(open_tokenizer(request.getfixturevalue(folder))) is None
