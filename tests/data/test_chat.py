from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.data.chat.render import ChatTemplate, chat_sample, rendered_chat
from pertoken.data.files.records import Record, read_records
from pertoken.data.formats import Conversation, KeyNames, to_conversation
from pertoken.data.tokens.encode import Encoded, Encoder, TextWithSpans
from pertoken.data.tokens.tokenizer import load_tokenizer
from pertoken.data.tokens.train import train_tokenizer
from pertoken.data.tokens.trained import CHATML
from pertoken.errors import RecipeError

UNMARKED = re.sub(r"{%- (end)?generation %}", "", CHATML)
PHI = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
DROPS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _chat(*contents: str, first: str = "user", context: int = 0) -> Conversation:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return Conversation(messages, weights=_weights(messages, context))


def _weights(messages: list[Any], context: int) -> tuple[float, ...]:
    return tuple([float(i >= context) for i in range(len(messages))])


def _with_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def _said(chat: Conversation, tokenizer: Any, **template_kwargs: Any) -> list[str]:
    (sample,) = _samples(chat, tokenizer, **template_kwargs)
    return sample


def _samples(chat: Conversation, tokenizer: Any, /, **template_kwargs: Any) -> list[list[str]]:
    """What the assistant says in each sample."""
    samples = rendered_chat(chat, ChatTemplate(tokenizer, template_kwargs)).samples
    return [[sample.text[start:end] for start, end in sample.spans] for sample in samples]


def _encode(tokenizer: Any, marked: TextWithSpans) -> Encoded:
    (encoded,) = Encoder(tokenizer).encode([marked])
    return encoded


@cache
def _token_bytes(character: str) -> int:
    """The byte that a character stands for in a byte-level vocabulary, worked out from GPT-2's rule."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    code = ord(character)
    return code if code in shown else hidden[code - 256]


def _slow(tokenizer: Any, ids: list[int], text: str, spans: list[tuple[int, int]]) -> tuple[list[bool], int]:
    """(supervised, supervised bytes) by counting bytes token by token, without the tokenizer's offsets."""
    edges = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans]
    at, supervised, num_bytes = 0, [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        special = token in tokenizer.all_special_tokens
        added = token in tokenizer.get_added_vocab()
        raw = token.encode() if added else bytes(map(_token_bytes, token))
        assert text.encode()[at : at + len(raw)] == raw
        supervised.append(any(a <= at and at + len(raw) <= b for a, b in edges))
        num_bytes += len(raw) if supervised[-1] and not special else 0
        at += len(raw)
    assert at == len(text.encode())
    return supervised, num_bytes


def _assert_equals_slow(tokenizer: Any, marked: TextWithSpans, spans: list[tuple[int, int]]) -> Encoded:
    encoded = _encode(tokenizer, marked)
    ids = tokenizer(marked.text, add_special_tokens=False).input_ids
    supervised, num_bytes = _slow(tokenizer, ids, marked.text, spans)
    assert encoded.tokens.tolist() == ids
    assert encoded.supervised.tolist() == supervised
    assert int(encoded.num_bytes @ encoded.supervised) == num_bytes
    return encoded


_tokenizer = cache(load_tokenizer)
_words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_chats = st.lists(st.tuples(_words, _words), min_size=1, max_size=4).map(
    lambda turns: _chat(*(t for p in turns for t in p))
)


@settings(deadline=None)
@given(chat=_chats)
def test_masks_and_bytes_equal_a_slow_recount_with_and_without_generation_marks(
    bpe_folder: Path, chat: Conversation
) -> None:
    tokenizer = _tokenizer(bpe_folder)
    text, spans = "", []
    for message in chat.messages:
        text += f"<|im_start|>{message['role']}\n"
        said = message["content"] + "<|im_end|>"
        if message["role"] == "assistant":
            spans.append((len(text), len(text) + len(said)))
        text += said + "\n"
    for template in (CHATML, UNMARKED):
        (marked,) = rendered_chat(chat, ChatTemplate(_with_template(tokenizer, template), {})).samples
        assert marked == TextWithSpans(text, spans)
        _assert_equals_slow(tokenizer, marked, spans)


def test_gsm8k_through_minimind_supervises_the_answer_and_its_end(minimind_tokenizer: Any, shared_data: Path) -> None:
    template = ChatTemplate(minimind_tokenizer, {})
    for row, _ in zip(read_records(shared_data / "sft" / "gsm8k" / "test.jsonl"), range(50), strict=False):
        assert isinstance(row, Record)
        assert isinstance(row.value, dict)
        chat = to_conversation(row, keys=KeyNames(prompt="question", completion="answer"))
        assert isinstance(chat, Conversation)
        (marked,) = rendered_chat(chat, template).samples
        start = marked.text.index("</think>\n\n") + len("</think>\n\n")  # the empty block is part of the prompt
        end = marked.text.rindex("<|im_end|>") + len("<|im_end|>")
        assert marked.text[start:end] == row.value["answer"] + "<|im_end|>"
        encoded = _assert_equals_slow(minimind_tokenizer, marked, [(start, end)])
        assert int(encoded.num_bytes @ encoded.supervised) == len(row.value["answer"].encode())


def test_minimind_reasoning_tools_and_calls_are_supervised_where_the_assistant_says_them(
    minimind_tokenizer: Any,
) -> None:
    call = {"name": "add", "arguments": {"a": 2}}
    value = {
        "conversations": [
            {"role": "system", "content": "S", "tools": json.dumps([{"name": "add"}])},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": json.dumps([call])},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "Four."},
        ]
    }
    chat = to_conversation(Record("f", 1, value, 0, 0), "auto")
    assert isinstance(chat, Conversation)
    assert _said(chat, minimind_tokenizer) == [
        'Hm.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
        "Four.<|im_end|>",
    ]
    assert _said(chat, minimind_tokenizer, open_thinking=True)[1] == "\n</think>\n\nFour.<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, UNMARKED, LLAMA])
def test_spans_of_several_template_families(bpe_tokenizer: Any, template: str) -> None:
    tokenizer = _with_template(bpe_tokenizer, template)
    space = " " if template == LLAMA else ""
    said = [f"{space}{words}<|im_end|>" for words in ("b", "", "d <|im_end|> e")]
    assert _said(_chat("a", "b", "c", "", "d", "d <|im_end|> e"), tokenizer) == said


def test_an_end_that_only_the_last_message_gets_is_what_each_turn_learns_to_write(bpe_tokenizer: Any) -> None:
    tokenizer = _with_template(bpe_tokenizer, PHI)
    end = "<|im_end|>\n<|endoftext|>"
    assert _samples(_chat("a", "b", "c", "d"), tokenizer) == [[f"b{end}"], [f"d{end}"]]


@pytest.mark.parametrize("template", [CHATML, UNMARKED])
def test_assistant_turns_of_a_prompt_are_context(bpe_tokenizer: Any, template: str) -> None:
    tokenizer = _with_template(bpe_tokenizer, template)
    assert _said(_chat("a", "b", "c", "d", context=3), tokenizer) == ["d<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, UNMARKED])
def test_a_conversation_may_start_with_the_assistant(bpe_tokenizer: Any, template: str) -> None:
    assert _said(_chat("a", "b", "c", first="assistant"), _with_template(bpe_tokenizer, template)) == [
        "a<|im_end|>",
        "c<|im_end|>",
    ]


def test_a_start_that_the_template_cannot_prompt_is_found_by_the_assistants_header(minimind_tokenizer: Any) -> None:
    assert _said(_chat("a", "b", "c", first="assistant"), minimind_tokenizer) == ["a<|im_end|>", "c<|im_end|>"]
    chat = _chat("a", "b", "c", first="assistant")
    chat.messages.insert(0, {"role": "system", "content": "<|im_start|>assistant"})
    assert _said(Conversation(chat.messages), minimind_tokenizer) == ["a<|im_end|>", "c<|im_end|>"]


def test_a_start_without_a_header_that_could_be_found_is_refused(bpe_tokenizer: Any) -> None:
    asks = "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}"
    with pytest.raises(ValueError, match=r"starts with an assistant turn, and .* or put a user turn before it"):
        _said(_chat("a", "b", "c", first="assistant"), _with_template(bpe_tokenizer, asks + LLAMA))


def test_a_template_that_drops_earlier_reasoning_takes_a_sample_for_each_turn_that_it_changes(
    bpe_tokenizer: Any,
) -> None:
    tokenizer = _with_template(bpe_tokenizer, DROPS_REASONING)
    chat = _chat("a", "b", "c", "d", "e", "f")
    assert _samples(chat, tokenizer) == [["b<|im_end|>", "d<|im_end|>", "f<|im_end|>"]]
    chat.messages[5]["reasoning_content"] = "hm"
    assert _samples(chat, tokenizer) == [["b<|im_end|>", "d<|im_end|>", "<think>hm</think>f<|im_end|>"]]
    chat.messages[3]["reasoning_content"] = "so"
    samples = [["b<|im_end|>", "<think>so</think>d<|im_end|>"], ["<think>hm</think>f<|im_end|>"]]
    assert _samples(chat, tokenizer) == samples
    with pytest.raises(ValueError, match=r"renders message 3 .* takes 2 samples; set data\.on_rewrite to \"split\""):
        rendered_chat(chat, ChatTemplate(tokenizer, {}, on_rewrite="error"))
    # Reasoning that is context may be dropped: the last turn is given what it is given at inference.
    last = Conversation(chat.messages, weights=_weights(chat.messages, 5))
    assert _said(last, tokenizer) == ["<think>hm</think>f<|im_end|>"]


def test_what_follows_the_last_supervised_turn_stays_where_it_changes_nothing(bpe_tokenizer: Any) -> None:
    chat = _chat("a", "b", "c")
    for template, tail in ((UNMARKED, "<|im_start|>user\nc<|im_end|>\n"), (DROPS_REASONING, "")):
        chat.messages[1]["reasoning_content"] = "hm"
        (sample,) = rendered_chat(chat, ChatTemplate(_with_template(bpe_tokenizer, template), {})).samples
        assert sample.text[sample.spans[-1][1] :] == f"\n{tail}"


def test_a_prompt_that_changes_what_is_before_the_turn_is_refused(bpe_tokenizer: Any) -> None:
    for template in (
        "{% if add_generation_prompt %}!{% endif %}" + UNMARKED,
        UNMARKED.replace("<|im_start|>' + message.role", "<|im_start|>' + messages | length | string + message.role"),
    ):
        tokenizer = _with_template(bpe_tokenizer, template)
        with pytest.raises(ValueError, match=r"renders what is before message 1 differently once that message follows"):
            _said(_chat("a", "b"), tokenizer)


def test_a_template_without_an_end_of_turn_needs_one(bpe_tokenizer: Any) -> None:
    header = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    body = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    tokenizer = _with_template(bpe_tokenizer, body + header)
    with pytest.raises(RecipeError, match=r'ends no turn .* with data\.end_of_turn="<\|im_start\|>", or set another'):
        ChatTemplate(tokenizer, {})
    template = ChatTemplate(tokenizer, {}, end_of_turn="<|im_start|>")
    (sample,) = rendered_chat(_chat("a", "b", "c", "d"), template).samples
    assert [sample.text[start:end] for start, end in sample.spans] == ["b<|im_start|>", "d<|im_start|>"]
    template = ChatTemplate(tokenizer, {}, end_of_turn="<|endoftext|>")
    (sample,) = rendered_chat(_chat("a", "b"), template).samples
    assert sample.text.endswith("b<|endoftext|>")
    with pytest.raises(RecipeError, match=r"data\.end_of_turn='<\|user\|>': no token of the tokenizer's own; name one"):
        ChatTemplate(tokenizer, {}, end_of_turn="<|user|>")


@pytest.mark.parametrize("template", [CHATML, UNMARKED])
def test_a_conversation_of_which_nothing_is_learned_is_still_a_sample(bpe_tokenizer: Any, template: str) -> None:
    """So that it is counted, where samples without a supervised token are dropped."""
    assert _said(_chat("a", "b", context=2), _with_template(bpe_tokenizer, template)) == []


def test_a_turn_that_is_not_ended_is_refused(bpe_tokenizer: Any) -> None:
    unended = UNMARKED.replace("{{- '<|im_end|>' }}", "{{- '' if message.tool_calls else '<|im_end|>' }}")
    chat = _chat("a", "b")
    chat.messages[1]["tool_calls"] = [{"name": "f", "arguments": {}}]
    with pytest.raises(ValueError, match=r"does not end message 1 with a special token, so no reply .* data\.end_of_"):
        _said(chat, _with_template(bpe_tokenizer, unended))


def test_a_template_that_fails_on_a_row_says_so_in_one_line(bpe_tokenizer: Any) -> None:
    refuses = "{% if messages | length > 2 %}{{ raise_exception('no\nlong chats') }}{% endif %}" + UNMARKED
    with pytest.raises(ValueError, match=r"the chat template cannot render it \(no long chats\); correct it or set"):
        _said(_chat("a", "b", "c", "d"), _with_template(bpe_tokenizer, refuses))


def test_our_own_template_by_its_marks_is_what_it_is_by_comparing_renderings(bpe_tokenizer: Any) -> None:
    call = {"name": "f", "arguments": {"a": [1, "é"]}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "S"},
        {"role": "assistant", "content": "Hello <|im_end|> there"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "content": "T"},
        {"role": "assistant", "content": "A"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "V"},
    ]
    for weights in (None, (0.0,) * 3 + (1.0,) * 5, (0.0,) * 6 + (1.0,) * 2):
        for tools in (None, [{"name": "f"}]):
            chat = Conversation(messages, tools, weights)
            template = ChatTemplate(bpe_tokenizer, {})
            assert template.is_chatml
            marks = rendered_chat(chat, template)
            template.is_chatml = False
            assert rendered_chat(chat, template) == marks


@pytest.mark.parametrize("marks", [False, True])
def test_marks_of_other_templates_are_not_trusted(bpe_tokenizer: Any, marks: bool) -> None:
    """SmolLM3's mark the header too."""
    header = "{{- '<|im_start|>assistant\\n' }}\n        {%- generation %}"
    wrong = "{%- generation %}{{- '<|im_start|>assistant\\n' }}"
    assert header in CHATML
    template = CHATML.replace(header, wrong) if marks else CHATML + " "
    assert _said(_chat("a", "b"), _with_template(bpe_tokenizer, template)) == ["b<|im_end|>"]


def test_the_template_for_tools_is_used_where_there_are_tools(bpe_tokenizer: Any) -> None:
    shouting = UNMARKED.replace("{{- message.content }}", "{{- message.content + '!' }}", 1)
    tokenizer = _with_template(bpe_tokenizer, {"default": UNMARKED, "tool_use": shouting})  # type: ignore[arg-type]
    chat = _chat("a", "b")
    assert _said(chat, tokenizer) == ["b<|im_end|>"]
    assert _said(Conversation(chat.messages, [{"name": "f"}]), tokenizer) == ["b!<|im_end|>"]


def test_a_date_is_the_one_that_is_given_or_the_templates_own(bpe_tokenizer: Any) -> None:
    asks = "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}"
    for template, own in ((asks, "26 Jul 2024"), ("{{ strftime_now('%d %b %Y') }}", None)):
        tokenizer = _with_template(bpe_tokenizer, template + UNMARKED)
        (sample,) = rendered_chat(_chat("a", "b"), ChatTemplate(tokenizer, {}, day="2026-01-31")).samples
        assert sample.text.startswith("31 Jan 2026<|im_start|>")
        if own is None:
            with pytest.raises(
                RecipeError, match=r"writes today's date, so samples would change .* data\.template_date"
            ):
                ChatTemplate(tokenizer, {})
        else:
            (sample,) = rendered_chat(_chat("a", "b"), ChatTemplate(tokenizer, {})).samples
            assert sample.text.startswith(f"{own}<|im_start|>")


def test_a_prompt_that_ends_within_a_word_leaves_the_word_to_the_answer(bpe_tokenizer: Any) -> None:
    """The rule is by tokens: what the prompt's tokens and the turn's share is context, and no more."""
    asks = "{% for m in messages %}{{ m.role }}:{{ ' ' }}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = _with_template(bpe_tokenizer, asks + "{% if add_generation_prompt %}assistant:{{ ' ' }}{% endif %}")
    word = next(
        token[1:] for token in tokenizer.get_vocab() if token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha()
    )
    sample = chat_sample(_chat("a", word), ChatTemplate(tokenizer, {}), Encoder(tokenizer))
    assert tokenizer.decode(sample.labels[sample.loss_mask]) == f" {word}<|im_end|>"


def test_a_tokenizer_without_a_template_is_refused(bpe_tokenizer: Any) -> None:
    bpe_tokenizer.chat_template = None
    with pytest.raises(RecipeError, match=r"data\.chat_template: the tokenizer has none; set it"):
        ChatTemplate(bpe_tokenizer, {})


def test_template_kwargs_reach_the_template(bpe_tokenizer: Any) -> None:
    tokenizer = _with_template(bpe_tokenizer, UNMARKED.replace("message.content", "message.content + (tail or '')"))
    assert _said(_chat("a", "b"), tokenizer, tail="!") == ["b!<|im_end|>"]


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_token_that_straddles_the_edge_of_a_span_is_supervised_where_it_begins_what_is_said(
    write_jsonl: Callable[..., Path], tmp_path: Path, trim_offsets: bool
) -> None:
    from tokenizers import processors

    text = "over the lazy dog"
    rows = write_jsonl("rows.jsonl", [{"text": text}] * 9)
    train_tokenizer([rows], vocab_size=300, out_dir=tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    assert tokenizer.tokenize(text) == ["over", "Ġthe", "Ġlazy", "Ġdog"]
    for spans, supervised in [
        ([(0, 17)], [True, True, True, True]),
        ([(0, 5)], [True, False, False, False]),  # over the end: the space is said, "the" is not
        ([(2, 13)], [True, True, True, False]),  # from inside the first token to the end of the third
        ([(5, 13)], [False, True, True, False]),  # "the", without the space that its token begins with
        ([(0, 4), (13, 17)], [True, False, False, True]),
        ([(9, 12)], [False, False, False, False]),
        ([], [False, False, False, False]),
    ]:
        encoded = _encode(tokenizer, TextWithSpans(text, spans))
        assert encoded.supervised.tolist() == supervised
        assert encoded.num_bytes.tolist() == [4, 4, 5, 4]


def test_pad_equal_to_eos_changes_no_mask(bpe_tokenizer: Any) -> None:
    chat = _chat("a <|im_end|>", "b", "c", "d")
    before = chat_sample(chat, ChatTemplate(bpe_tokenizer, {}), Encoder(bpe_tokenizer))
    bpe_tokenizer.pad_token = bpe_tokenizer.eos_token
    after = chat_sample(chat, ChatTemplate(bpe_tokenizer, {}), Encoder(bpe_tokenizer))
    np.testing.assert_array_equal(before.tokens, after.tokens)
    np.testing.assert_array_equal(before.loss_mask, after.loss_mask)
    assert after.loss_mask.sum() == 4


def test_the_mask_of_a_sample_is_about_its_labels(bpe_tokenizer: Any) -> None:
    sample = chat_sample(_chat("a", "xyz"), ChatTemplate(bpe_tokenizer, {}), Encoder(bpe_tokenizer))
    assert bpe_tokenizer.decode(sample.labels[sample.loss_mask]) == "xyz<|im_end|>"
    assert bpe_tokenizer.decode(sample.input_ids[sample.loss_mask]) == "\nxyz"


def test_saved_padding_and_truncation_do_not_reach_the_samples(bpe_tokenizer: Any) -> None:
    text = TextWithSpans("a long text about the dog", [])
    expected = _encode(bpe_tokenizer, text).tokens.tolist()
    bpe_tokenizer.backend_tokenizer.enable_truncation(3)
    bpe_tokenizer.backend_tokenizer.enable_padding(length=64)
    assert _encode(bpe_tokenizer, text).tokens.tolist() == expected


@pytest.mark.parametrize("text", ["", "é", "👩‍🚀🙂", "a\u0301bc 世界\n"])
def test_bytes_of_all_tokens_are_the_bytes_of_the_text(bpe_tokenizer: Any, char_tokenizer: Any, text: str) -> None:
    for tokenizer in (bpe_tokenizer, char_tokenizer):
        encoded = _encode(tokenizer, TextWithSpans(text, [(0, len(text))]))
        unknown = [c for c in text if tokenizer is char_tokenizer and c not in tokenizer.get_vocab()]
        assert encoded.num_bytes.sum() == len(text.encode()) - len("".join(unknown).encode())
        assert encoded.supervised.all()
