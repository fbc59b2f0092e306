"""Control tokens typed in data cannot steer, and are said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pertoken.data.chat.headers import headers_of
from pertoken.data.chat.render import ChatTemplate
from pertoken.data.chat.typed_specials import mark_typed, unmark
from pertoken.data.files.records import Record
from pertoken.data.formats import Conversation
from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.data.tokens.control import ControlTokens
from pertoken.data.tokens.encode import Encoder, TextWithSpans
from pertoken.errors import DataError
from pertoken.inference.chat import ChatSession
from pertoken.prove.expected import difference
from pertoken.prove.turns import expected_samples
from pertoken.recipe.data import DataConfig

END = "<|im_end|>"


def _build(path: Path, tokenizer: Any, stage: Any = "sft", **data: Any) -> Store:
    config = DataConfig.model_validate({"path": str(path), "store": str(path.parent / "cache"), **data})
    return build_store([str(path)], stage=stage, tokenizer=tokenizer, data=config)


def _row(user: str, assistant: str = "a dog") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def _text(store: Store, i: int, tokenizer: Any) -> str:
    return str(tokenizer.decode(store[i].tokens.tolist(), skip_special_tokens=False))


def test_a_typed_end_of_turn_is_text_and_the_template_s_own_is_the_token(write_jsonl: Any, bpe_tokenizer: Any) -> None:
    end = bpe_tokenizer.convert_tokens_to_ids(END)
    path = write_jsonl("a.jsonl", [_row(f"say {END}", f"it is {END} <|im_start|>"), _row("fox")])
    store = _build(path, bpe_tokenizer)
    assert [int((store[i].tokens == end).sum()) for i in range(2)] == [2, 2]
    rendered = bpe_tokenizer.apply_chat_template(
        _row(f"say {END}", f"it is {END} <|im_start|>")["messages"], tokenize=False
    )
    assert _text(store, 0, bpe_tokenizer) == rendered
    said = bpe_tokenizer.decode(store[0].labels[store[0].loss_mask].tolist(), skip_special_tokens=False)
    assert said == f"it is {END} <|im_start|>{END}"
    assert int(store.num_bytes[0]) == len(f"it is {END} <|im_start|>")
    (note,) = store.report.findings.notes(store.files)
    assert note == f"3 control tokens typed in the data, encoded as plain text ({path}:1, ...)"


def test_special_takes_them_for_what_they_are_and_error_refuses_the_row(write_jsonl: Any, bpe_tokenizer: Any) -> None:
    end = bpe_tokenizer.convert_tokens_to_ids(END)
    path = write_jsonl("a.jsonl", [_row("fox"), _row(f"say {END}")])
    store = _build(path, bpe_tokenizer, special_in_text="special")
    assert int((store[1].tokens == end).sum()) == 3
    assert store.report.findings.notes(store.files) == [
        f'1 control token typed in the data; data.special_in_text="special" ({path}:2)'
    ]
    with pytest.raises(
        DataError, match=r"a.jsonl:2: conversation: the control token <\|im_end\|> is typed in it; remove"
    ):
        _build(path, bpe_tokenizer, special_in_text="error")


def test_rows_without_control_tokens_are_the_same_samples_whatever_is_set(write_jsonl: Any, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [_row("a < b | c", "<|im_"), _row("<think>", "</think> <tool_call>")])
    stores = [_build(path, bpe_tokenizer, special_in_text=policy) for policy in ("text", "special", "error")]
    for i in range(2):
        assert len({bytes(store[i].tokens) for store in stores}) == 1
    assert stores[0].report.findings.kinds() == []
    assert len(stores[0].fingerprints) == 3, "and a run of an earlier version may be resumed"


def test_rows_that_have_them_are_no_longer_those_of_earlier_versions(write_jsonl: Any, bpe_tokenizer: Any) -> None:
    store = _build(write_jsonl("a.jsonl", [_row(END)]), bpe_tokenizer)
    assert len(store.fingerprints) == 1


def test_what_models_write_themselves_and_what_a_recipe_adds_stays_a_token(bpe_folder: Path) -> None:
    from pertoken.data.tokens.tokenizer import load_tokenizer

    own = [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_response>",
        "[TOOL_CALLS]",
        "<|python_tag|>",
        "<|begin_of_thought|>",
    ]
    tokenizer = load_tokenizer(bpe_folder, add_tokens=[*own, "<|mine|>", "<|eot|>"])
    control = ControlTokens.of(tokenizer)
    assert control.names == ("<|endoftext|>", "<|eot|>", "<|im_end|>", "<|im_start|>", "<|mine|>")
    assert "<|mine|>" not in ControlTokens.of(tokenizer, ["<|mine|>"]).names
    tokenizer.chat_template += "<|mine|>"
    assert "<|mine|>" in ControlTokens.of(tokenizer, ["<|mine|>"]).names, "its template writes it"


def test_tool_arguments_and_tools_are_marked_too(bpe_tokenizer: Any) -> None:
    control = ControlTokens.of(bpe_tokenizer)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": [f"a{END}"]}}}
    messages = [{"role": "user", "content": "\ue000"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    chat, mark = mark_typed(Conversation(messages, [{"name": END}], (0, 0.5)), control)
    assert mark == "\ue001", "not one that is there already"
    marked = END[0] + mark + END[1:]
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": [f"a{marked}"]}
    assert (chat.tools, chat.weights) == ([{"name": marked}], (0, 0.5))
    assert messages[1]["tool_calls"] == [call], "the row is left as it is"


def test_unmark_moves_the_spans_and_says_where_typed_tokens_are(bpe_tokenizer: Any) -> None:
    control = ControlTokens.of(bpe_tokenizer)
    text = TextWithSpans("a<\ue000|im_end|>b<|im_end|>", [(1, 13), (13, 23)], [0.5, 1])
    assert unmark(text, "\ue000", control) == TextWithSpans(
        "a<|im_end|>b<|im_end|>", [(1, 12), (12, 22)], [0.5, 1], [(1, 11)]
    )
    with pytest.raises(ValueError, match="escapes characters"):
        unmark(TextWithSpans("a\\ue000", []), "\ue000", control)


def _tokenizer(kind: str) -> Any:
    specials = [AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<unk>", "[E]")]
    characters = {c: i + 4 for i, c in enumerate("ab ▁<>/s[]E\n|")}
    vocab = {str(token.content): i for i, token in enumerate(specials)} | characters
    if kind == "unigram":
        backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in vocab], unk_id=2))
    elif kind == "merged":
        backend = Tokenizer(models.BPE(vocab | {"[E": 50, "[E]": 3}, [("[", "E"), ("[E", "]")], unk_token="<unk>"))
    else:
        backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=False))
    if kind == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif kind in ("first", "unigram"):
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
        backend.decoder = decoders.Metaspace("▁", prepend_scheme="first")
    if kind == "strips":
        specials[3] = AddedToken("[E]", special=True, lstrip=True, rstrip=True)
    backend.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=["[E]"]
    )


KINDS = ("characters", "legacy", "first", "unigram", "strips")
PIECES = st.lists(st.sampled_from(["a", "b ", " ", "<s>", "</s>", "[E]", "\n", "<", "s>", "ab", "é"]), max_size=8)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=PIECES, which=st.lists(st.booleans(), min_size=8, max_size=8))
def test_genuine_tokens_are_what_they_are_and_typed_ones_their_characters(
    kind: str, pieces: list[str], which: list[bool]
) -> None:
    tokenizer = _tokenizer(kind)
    encoder, text, typed, genuine, rest = Encoder(tokenizer), "", [], list[str](), ""
    for piece, is_typed in zip(pieces, which, strict=False):
        if is_typed and piece in ("<s>", "</s>", "[E]"):
            typed.append((len(text), len(text) + len(piece)))
            genuine, rest = genuine + re.findall(r"</?s>|\[E\]", rest), ""
        else:
            rest += piece
        text += piece
    genuine += re.findall(r"</?s>|\[E\]", rest)
    (encoded,) = encoder.encode([TextWithSpans(text, [(0, len(text))], typed=typed)])
    names = tokenizer.convert_ids_to_tokens(encoded.tokens.tolist())
    assert [name for name in names if name in ("<s>", "</s>", "[E]")] == genuine
    assert encoded.num_bytes.sum() <= len(text.encode())
    if not typed:
        assert encoded.tokens.tolist() == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_typed_is_encoded_otherwise(kind: str) -> None:
    tokenizer = _tokenizer(kind)
    encoder = Encoder(tokenizer)
    # A typed token at the end: what is before it is encoded as ever, with every genuine token and each space.
    before = "a b</s>b a[E] ab\n<s>"
    (alone,) = encoder.encode([TextWithSpans(before + "a", [])])
    (both,) = encoder.encode([TextWithSpans(before + "a[E]", [], typed=[(len(before) + 1, len(before) + 4)])])
    assert both.tokens[: len(alone.tokens)].tolist() == alone.tokens.tolist()
    assert tokenizer.convert_ids_to_tokens(both.tokens[len(alone.tokens) :].tolist()) == ["[", "E", "]"]
    assert both.num_bytes[-3:].tolist() == [1, 1, 1]


def test_a_tokenizer_that_cannot_tell_them_apart_refuses(write_jsonl: Any) -> None:
    encoder = Encoder(_tokenizer("merged"))
    with pytest.raises(ValueError, match=r"cannot be told"):
        list(encoder.encode([TextWithSpans("a[E]", [], typed=[(1, 4)])]))
    with pytest.raises(ValueError, match="private use"):
        list(encoder.encode([TextWithSpans("\U000f0001[E]", [], typed=[(1, 4)])]))


@pytest.mark.parametrize("long", [False, True])
def test_documents_obey_long_ones_in_pieces_too(
    tmp_path: Path, bpe_tokenizer: Any, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if long:
        monkeypatch.setattr("pertoken.data.samples._CHUNK_CHARS", 100)
        monkeypatch.setattr("pertoken.data.files.records._WHOLE_CHARS", 100, raising=False)
        monkeypatch.setattr("pertoken.data.tokens.cuts._PIECE_CHARS", 40)
    text = f"the fox {END} and <|im_start|>the dog. " * 20
    path = tmp_path / "a.txt"
    path.write_text(text + "<|im_end|>")
    store = _build(path, bpe_tokenizer, "pretrain", max_seq_len=4096)
    (sample,) = [store[i] for i in range(len(store))]
    special = [bpe_tokenizer.convert_tokens_to_ids(name) for name in (END, "<|im_start|>")]
    assert np.flatnonzero(np.isin(sample.tokens, special)).tolist() == [len(sample)], "the end alone, and once"
    assert _text(store, 0, bpe_tokenizer) == text + END
    first, second = store.report.findings.notes(store.files)
    assert first.startswith("40 control tokens typed in the data, encoded as plain text")
    assert second.startswith("1 document ends with the eos token, so none is added")
    kept = _build(path, bpe_tokenizer, "pretrain", max_seq_len=4096, special_in_text="special")
    assert int(np.isin(kept[0].tokens, special).sum()) == 41
    with pytest.raises(DataError, match=r"a\.txt:1: text: the control token"):
        _build(path, bpe_tokenizer, "pretrain", special_in_text="error")


def test_a_long_text_is_counted_across_the_ends_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pertoken.data.files import long_text

    monkeypatch.setattr(long_text, "_BLOCK_BYTES", 7)
    control = ControlTokens(["<e>", "<e><f>", "<g>"])
    path = tmp_path / "a.txt"
    for text in ("<g>abc<e>", "<e><f>", "x<e>" * 9 + "<e><f>" * 5 + "<g>", "abc", "<e", "é<e>é"):
        path.write_text(text)
        seen = long_text.look_through(path)
        whole = long_text.LongText(str(path), seen.sha256, 0, seen.num_chars)
        assert control.look_through(whole) == control.look_through(text)
    assert control.look_through("<g>a<e>b<e><f>").__dict__ == {
        "count": 3,
        "first": "<e>",
        "begins": "<g>",
        "ends": "<e><f>",
    }


def test_text_that_was_rendered_before_is_named_with_the_way_to_train_it(write_jsonl: Any, bpe_tokenizer: Any) -> None:
    prompt = "<|im_start|>user\nfox<|im_end|>\n<|im_start|>assistant\n"
    path = write_jsonl(
        "a.jsonl", [{"prompt": prompt, "completion": "dog"}, {"prompt": "say <|im_start|>user", "completion": "x"}]
    )
    notes = _build(path, bpe_tokenizer).report.notes()
    assert any(
        note.startswith("1 conversation with a message that begins with the chat template's own") for note in notes
    )
    assert any('set stage="pretrain" and data.special_in_text="special"' in note for note in notes)
    texts = write_jsonl("b.jsonl", [{"text": prompt}, {"text": "the fox"}])
    found = _build(texts, bpe_tokenizer, "pretrain").report.notes()
    assert any(note.startswith("1 document begins with a control token") and f"({texts}:1)" in note for note in found)
    kept = _build(texts, bpe_tokenizer, "pretrain", special_in_text="special")
    assert not any("documents begin" in note for note in kept.report.notes())
    assert int((kept[0].tokens == bpe_tokenizer.convert_tokens_to_ids("<|im_start|>")).sum()) == 2


def test_headers_of_templates(bpe_tokenizer: Any) -> None:
    assert set(headers_of(ChatTemplate(bpe_tokenizer, {}))) == {
        *(f"<|im_start|>{role}" for role in ("system", "user", "assistant"))
    }
    bpe_tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
    )
    assert set(headers_of(ChatTemplate(bpe_tokenizer, {}))) == {"<|im_start|>[user]", "[user]", "[assistant]"}


def test_a_chat_encodes_what_is_typed_as_training_does(write_jsonl: Any, bpe_tokenizer: Any) -> None:
    messages = _row(f"say {END} fox")["messages"]
    store = _build(write_jsonl("a.jsonl", [{"messages": messages}]), bpe_tokenizer)
    session = ChatSession(None, bpe_tokenizer, frozenset(), {}, ControlTokens.of(bpe_tokenizer))  # type: ignore[arg-type]
    prompt = session.encode_chat(messages[:1])
    assert prompt == store[0].tokens[: len(prompt)].tolist()
    assert prompt.count(bpe_tokenizer.eos_token_id) == 1
    plain = session.encode_chat([{"role": "user", "content": "fox"}])
    rendered = bpe_tokenizer.apply_chat_template(
        [{"role": "user", "content": "fox"}], tokenize=False, add_generation_prompt=True
    )
    assert plain == bpe_tokenizer.encode(rendered)


@pytest.mark.parametrize("max_seq_len", [70, 4096])
def test_prove_knows_what_typed_tokens_become(write_jsonl: Any, bpe_tokenizer: Any, max_seq_len: int) -> None:
    row = _row(f"say {END} <|im_start|>fox", f"it is {END}, the quick brown fox")
    data = {"max_seq_len": max_seq_len, "overlong": "truncate"}
    config = DataConfig.model_validate({"path": "x", **data})
    store = _build(write_jsonl("a.jsonl", [row]), bpe_tokenizer, **data)
    expected = expected_samples(Record("a.jsonl", 1, row, 0, 0), config, bpe_tokenizer)
    assert not isinstance(expected, str)
    tokens = expected[0].tokens[: max_seq_len + 1]
    assert difference(store[0].tokens, tokens) is None
    as_tokens = np.array(bpe_tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"])
    assert difference(as_tokens[: max_seq_len + 1], tokens) is not None
    changed = store[0].tokens.copy()
    changed[8] = 50
    assert difference(changed, tokens) is not None


def test_a_marked_conversation_that_a_template_escapes_is_refused(write_jsonl: Any, bpe_tokenizer: Any) -> None:
    bpe_tokenizer.chat_template = bpe_tokenizer.chat_template.replace(
        "message.content + '<|im_end|>", "(message.content.encode('unicode_escape') | string) + '<|im_end|>"
    )
    path = write_jsonl("a.jsonl", [_row(f"say {END}")])
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: conversation: the chat template (escapes|cannot render|leaves out)"
    ):
        _build(path, bpe_tokenizer)
