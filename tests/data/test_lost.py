"""What a template leaves out of a conversation is said, and nothing that it writes is taken for left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pertoken.data.chat.calls import with_arguments
from pertoken.data.chat.lost import lost_context, lost_reasoning, lost_words
from pertoken.data.chat.render import ChatTemplate, rendered_chat
from pertoken.data.formats import Conversation
from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.data.tokens.trained import CHATML
from pertoken.errors import DataError
from pertoken.recipe.data import DataConfig

UNMARKED = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
SPECIAL = ("<|im_end|>", "<|im_start|>")
ARGUMENTS = {"city": 'Köln "Süd"', "days": 3, "hourly": True, "none": None, "lines": ["a\nb"]}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": ARGUMENTS}}]}


@pytest.mark.parametrize(
    "said",
    [
        json.dumps({"name": "weather", "arguments": ARGUMENTS}),
        json.dumps({"name": "weather", "arguments": ARGUMENTS}, ensure_ascii=False, indent=2),
        f"<call>weather {ARGUMENTS}</call>",
        'weather(city=Köln "Süd", days=3, hourly=True, none=null, lines=["a\\nb"])',
    ],
)
def test_arguments_stand_however_they_are_written(said: str) -> None:
    assert lost_words(CALL, said, SPECIAL) is None


@pytest.mark.parametrize(
    ("said", "lost"),
    [
        ("<|im_end|>", 'the call of "weather"; set data.chat_template to one that writes tool_calls'),
        (json.dumps({"name": "weather"}), 'the argument "city" of the call of "weather"'),
        (json.dumps({"name": "weather", "arguments": ARGUMENTS | {"days": 4}}), 'the argument "3"'),
        (json.dumps({"name": "weather", "arguments": ARGUMENTS | {"hourly": 0}}), 'the argument "True"'),
        (json.dumps({"name": "weather", "arguments": json.dumps(ARGUMENTS)}), "as JSON within JSON"),
    ],
)
def test_a_call_that_is_lost_or_encoded_twice_is_said(said: str, lost: str) -> None:
    assert lost in str(lost_words(CALL, said, SPECIAL))


def test_arguments_that_are_text_stand_as_they_are() -> None:
    call = {"content": "", "tool_calls": [{"name": "run", "arguments": 'print("x")'}]}
    assert lost_words(call, 'run print("x")', SPECIAL) is None
    assert "as JSON within JSON" in str(
        lost_words(call, json.dumps({"name": "run", "arguments": 'print("x")'}), SPECIAL)
    )


@pytest.mark.parametrize(
    ("content", "said", "lost"),
    [
        ("  A word. \n", "A word.<|im_end|>", False),
        ("<think>\nhm\n</think>\n\nA word.", "hm</think>A word.<|im_end|>", False),
        ("<think>\nhm\n</think>\n\nA word.", "A word.<|im_end|>", True),
        ("", "<|im_end|>", False),
        ("end", "<|im_end|>", True),
        ("A <|im_end|>", "A <|im_end|><|im_end|>", False),
        ("x" * 100, "x" * 99, True),
    ],
)
def test_content(content: str, said: str, lost: bool) -> None:
    found = lost_words({"content": content}, said, SPECIAL)
    assert (found is not None) is lost
    assert found is None or len(found) < 200
    assert lost_reasoning({"content": "", "reasoning_content": content}, said.replace("im_end", "")) is (
        lost or "think" in content or "im_end" in content
    )


def test_context() -> None:
    chat = Conversation(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}, CALL],
        [{"type": "function", "function": {"name": "weather"}}, {"name": "clock"}],
    )
    whole = "Be brief. Why? weather clock"
    assert lost_context(chat, 2, whole, whole) is None
    assert 'leaves out "Be brief." of the system message 0; set' in str(lost_context(chat, 2, "Why?", whole))
    assert 'leaves out "Why?" of the user message 1; set' in str(lost_context(chat, 2, "Be brief.", whole))
    assert 'the tool "clock"; set data.chat_template to one that writes tools' in str(
        lost_context(chat, 2, whole, "weather")
    )


def test_arguments_become_objects_or_text() -> None:
    chat = Conversation([{"role": "user", "content": "a"}, CALL])
    text = with_arguments(chat, as_text=True)
    assert json.loads(text.messages[1]["tool_calls"][0]["function"]["arguments"]) == ARGUMENTS
    assert with_arguments(text, as_text=False) == chat
    assert with_arguments(chat, as_text=False) is chat
    for odd in ("no JSON", "[1]", "3", ""):
        other = Conversation([{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": odd}]}])
        assert with_arguments(other, as_text=False) is other


@pytest.mark.parametrize("given", [ARGUMENTS, json.dumps(ARGUMENTS)])
def test_a_template_gets_the_arguments_as_it_needs_them(bpe_tokenizer: Any, given: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": given}]}
    chat = Conversation([{"role": "user", "content": "a"}, call])
    for written in ("(call | tojson)", "call.name + call.arguments"):
        bpe_tokenizer.chat_template = UNMARKED.replace("(call | tojson)", written)
        (sample,) = rendered_chat(chat, ChatTemplate(bpe_tokenizer, {})).samples
        ((start, end),) = sample.spans
        assert json.dumps(ARGUMENTS, ensure_ascii=False) in sample.text[start:end]


def _build(path: Path, tokenizer: Any, **data: Any) -> Store:
    config = DataConfig(path=(str(path),), store=str(path.parent / "store"), workers=1, **data)
    return build_store(config.path, stage="sft", tokenizer=tokenizer, data=config)


def _rows(*replies: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for reply in replies:
        messages += [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **reply}]
    return [{"messages": messages}]


def test_reasoning_that_is_left_out_is_refused_put_inline_or_dropped(
    bpe_tokenizer: Any, write_jsonl: Callable[..., Path]
) -> None:
    bpe_tokenizer.chat_template = UNMARKED.replace("message.reasoning_content", "false")
    path = write_jsonl("a.jsonl", _rows({"reasoning_content": "hm"}, {}))
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: .* message 1: .* leaves out its reasoning; set data\.reasoning to"
    ):
        _build(path, bpe_tokenizer)
    for reasoning, said in (("drop", "b<|im_end|>"), ("inline", "<think>\nhm\n</think>\n\nb<|im_end|>")):
        sample = _build(path, bpe_tokenizer, reasoning=reasoning)[0]
        assert bpe_tokenizer.decode(sample.labels[sample.loss_mask]) == f"{said}b<|im_end|>"


def test_split_conversations_and_empty_thoughts_are_counted(
    bpe_tokenizer: Any, write_jsonl: Callable[..., Path]
) -> None:
    thinks = "{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}\n        {{- message.content }}"
    bpe_tokenizer.chat_template = UNMARKED.replace("{{- message.content }}", thinks, 1)
    path = write_jsonl("a.jsonl", [*_rows({}), *_rows({}, {}, {})])
    store = _build(path, bpe_tokenizer)
    assert (store.report.samples, [int(line) for line in store.lines]) == (4, [1, 2, 2, 2])
    repeated = sum(int((~store[i].loss_mask).sum()) + 1 for i in (1, 2))  # a sample's first token is no label
    assert store.report.notes()[1:] == [
        f"1 conversation becomes several samples, since the chat template renders turns differently later "
        f"(data.on_rewrite) ({path}:2)",
        f"{repeated:,} tokens of context are repeated in other samples ({path}:2, ...)",
        f"4 turns learn to write an empty thinking block ({path}:1, 2, ...)",
    ]
    header = "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    assert bpe_tokenizer.chat_template.endswith(header)
    off = (
        "{{- '<|im_start|>assistant\\n' + ('' if enable_thinking | default(true) else '<think>\\n\\n</think>\\n\\n') }}"
    )
    bpe_tokenizer.chat_template = bpe_tokenizer.chat_template.removesuffix(header) + off + "{%- endif %}\n"
    assert (
        "data.template_kwargs.enable_thinking=false makes it part of the prompt"
        in _build(path, bpe_tokenizer).report.notes()[3]
    )
    assert len(_build(path, bpe_tokenizer, template_kwargs={"enable_thinking": False}).report.notes()) == 3
    with pytest.raises(DataError, match=r"a\.jsonl:2: .* this takes 3 samples; set data\.on_rewrite"):
        _build(path, bpe_tokenizer, on_rewrite="error")
