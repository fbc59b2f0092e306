from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pertoken.data.chat.template import end_of_turn_id, render
from pertoken.data.store.build import build_store
from pertoken.data.tokens.encode import Encoder
from pertoken.data.tokens.tokenizer import load_tokenizer, open_tokenizer, special_ids
from pertoken.data.tokens.train import train_tokenizer
from pertoken.data.tokens.trained import CHATML, SPECIAL_TOKENS
from pertoken.errors import DataError, ModelError, RecipeError
from pertoken.folders.files import save_tokenizer
from pertoken.recipe.data import DataConfig


def test_importing_the_module_imports_no_transformers() -> None:
    code = (
        "import sys, pertoken.data.tokens.tokenizer, pertoken.data.chat.render; sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["bpe_folder", "char_folder"])
def test_a_trained_folder_loads_with_auto_tokenizer_and_has_its_special_tokens(
    kind: str, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(request.getfixturevalue(kind)), local_files_only=True)
    assert tuple(tokenizer.convert_ids_to_tokens([0, 1, 2])) == SPECIAL_TOKENS
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        0,
        0,
        1,
        2,
    )
    assert tokenizer.chat_template == CHATML
    assert end_of_turn_id(tokenizer, {}) == 2


_load_once = cache(load_tokenizer)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips_through_a_byte_level_tokenizer(bpe_folder: Path, text: str) -> None:
    tokenizer = _load_once(bpe_folder)
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token(bpe_tokenizer: Any) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ByteLevel.alphabet()) <= set(bpe_tokenizer.get_vocab())
    assert len(bpe_tokenizer) == 320


def test_digits_are_single_tokens(bpe_tokenizer: Any) -> None:
    assert bpe_tokenizer.tokenize("12345") == list("12345")


def test_a_character_tokenizer_has_one_token_per_character_and_round_trips(
    char_tokenizer: Any, text_file: Path
) -> None:
    text = text_file.read_bytes().decode()
    ids = char_tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text)
    assert char_tokenizer.decode(ids) == text
    assert len(char_tokenizer) == len(set(text)) + 3
    assert char_tokenizer("¿", add_special_tokens=False).input_ids == [0]


def test_conversations_and_text_rows_are_trained_on(write_jsonl: Callable[..., Path], tmp_path: Path) -> None:
    chats = write_jsonl(
        "chats.jsonl", [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}]
    )
    texts = write_jsonl("texts.jsonl", [{"body": "ef"}])
    pairs = write_jsonl("pairs.jsonl", [{"q": "gh", "a": "ij"}])
    train_tokenizer(
        [chats, texts, pairs],
        vocab_size=None,
        kind="char",
        out_dir=tmp_path / "t",
        text_key="body",
        prompt_key="q",
        completion_key="a",
    )
    vocab = load_tokenizer(tmp_path / "t").get_vocab()
    assert set(vocab) == {*SPECIAL_TOKENS, *"abcdefghij", *"\nassistantsystemtooluser"}


@pytest.mark.parametrize(
    ("rows", "arguments", "error", "message"),
    [
        ([{"text": "abc"}], {"vocab_size": 258}, RecipeError, r"vocab_size=258: .* at least 259"),
        ([{"text": "abc"}], {"vocab_size": None}, RecipeError, r"vocab_size=None: .* at least 259"),
        ([{"text": "abc"}], {"vocab_size": 5, "kind": "char"}, RecipeError, r"vocab_size=5: .*, so at least 18 are"),
        ([{"text": 3}, "{", {"x": 1}], {"vocab_size": 300}, DataError, r":1: text: a number.*\n.*:2: row.*\n.*:3: row"),
        ([{"prompt": "", "completion": ""}], {"vocab_size": 300}, DataError, r"no text to train a tokenizer on"),
    ],
)  # fmt: skip
def test_training_on_nothing_or_for_too_few_tokens_is_refused(
    write_jsonl: Callable[..., Path], tmp_path: Path, rows: Any, arguments: Any, error: Any, message: str
) -> None:
    file = write_jsonl("a.jsonl", rows)
    with pytest.raises(error, match=message):
        train_tokenizer([file], out_dir=tmp_path / "t", **arguments)
    assert not (tmp_path / "t").exists()


def test_a_folder_that_is_none_or_holds_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing: no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"has no tokenizer\.json, so tokens .*; save it with") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_of_transformers_5_opens_in_either_version_without_a_word(
    bpe_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(bpe_folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|extra|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([len(tokenizer) - 1]) == "<|extra|>"
    assert len(tokenizer) - 1 in special_ids(tokenizer)
    assert caplog.records == []


def test_added_tokens_are_special_and_single(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder, add_tokens=["<tool>", "<tool>", "<|im_end|>"])
    assert len(tokenizer) == 321
    assert tokenizer("a<tool>b", add_special_tokens=False).input_ids[1] == 320
    assert 320 in tokenizer.all_special_ids
    with pytest.raises(RecipeError, match=r"data\.add_tokens: an empty token"):
        load_tokenizer(bpe_folder, add_tokens=[""])


def test_a_chat_template_is_a_name_a_file_or_a_text(bpe_folder: Path, tmp_path: Path) -> None:
    inline = "{{ messages[0].content }}"
    (tmp_path / "my.jinja").write_text(inline)
    assert load_tokenizer(bpe_folder, chat_template=inline).chat_template == inline
    assert load_tokenizer(bpe_folder, chat_template=str(tmp_path / "my.jinja")).chat_template == inline
    assert load_tokenizer(bpe_folder, chat_template="chatml").chat_template == CHATML
    for wrong in ("chatlm", str(tmp_path / "other.jinja"), str(bpe_folder)):
        with pytest.raises(RecipeError, match=r"data\.chat_template=.*neither a \.jinja file nor Jinja text"):
            load_tokenizer(bpe_folder, chat_template=wrong)


def _base_folder(folder: Path) -> Path:
    """A base model's tokenizer: no chat template, no turn tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(vocab={"<eos>": 0, "a": 1, "<unk>": 2}, merges=[], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>").save_pretrained(str(folder))
    return folder


def test_chatml_for_a_base_tokenizer_asks_for_its_turn_tokens(tmp_path: Path) -> None:
    folder = _base_folder(tmp_path)
    with pytest.raises(
        RecipeError, match=r"the tokenizer lacks \['<\|im_start\|>', '<\|im_end\|>'\]; add data.add_tokens"
    ):
        load_tokenizer(folder, chat_template="chatml")
    tokenizer = load_tokenizer(folder, chat_template="chatml", add_tokens=SPECIAL_TOKENS[1:])
    assert end_of_turn_id(tokenizer, {}) == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id


def test_the_end_of_turn_falls_back_to_eos(tmp_path: Path, bpe_tokenizer: Any) -> None:
    assert end_of_turn_id(load_tokenizer(_base_folder(tmp_path)), {}) == 0
    bpe_tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_of_turn_id(bpe_tokenizer, {}) == 2
    bpe_tokenizer.eos_token = None
    with pytest.raises(RecipeError, match=r"neither an end-of-turn token in its chat template nor an eos token"):
        end_of_turn_id(bpe_tokenizer, {})


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ raise_exception('no\nchats') }}", "{{ messages[9].content + 1 }}"]
)
def test_a_template_that_cannot_render_a_chat_is_refused(bpe_tokenizer: Any, template: str) -> None:
    bpe_tokenizer.chat_template = template
    with pytest.raises(RecipeError, match=r"data\.chat_template: .* cannot render it \([^\n]+\); correct"):
        end_of_turn_id(bpe_tokenizer, {})


def test_the_end_of_turn_is_the_templates_own_token(minimind_tokenizer: Any, bpe_tokenizer: Any) -> None:
    assert end_of_turn_id(minimind_tokenizer, {}) == 2
    bpe_tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}{{ end }}\n{% endfor %}"
    assert end_of_turn_id(bpe_tokenizer, {"end": "<|endoftext|>"}) == 0


def test_our_template_renders_system_tools_reasoning_and_calls(bpe_tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "T"},
        {"role": "assistant", "content": "A"},
    ]
    text, spans = render(bpe_tokenizer, messages, tools=[{"name": "f"}], template_kwargs={}, mark=True)
    assert text == (
        '<|im_start|>system\nS\n\nTools, one JSON object a line:\n{"name": "f"}<|im_end|>\n'
        "<|im_start|>user\nU<|im_end|>\n"
        '<|im_start|>assistant\n<think>\nR\n</think>\n\n\n<tool_call>{"name": "f"}</tool_call><|im_end|>\n'
        "<|im_start|>tool\nT<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    )
    assert [text[a:b] for a, b in spans] == [
        '<think>\nR\n</think>\n\n\n<tool_call>{"name": "f"}</tool_call><|im_end|>',
        "A<|im_end|>",
    ]
    prompt, _ = render(bpe_tokenizer, messages[1:2], template_kwargs={}, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


def test_several_templates_are_saved_without_a_folder_and_loaded_again(bpe_tokenizer: Any, tmp_path: Path) -> None:
    """A checkpoint holds files alone."""
    bpe_tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML + " "}
    save_tokenizer(bpe_tokenizer, tmp_path / "saved")
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]
    again = open_tokenizer(tmp_path / "saved")
    assert again.chat_template == bpe_tokenizer.chat_template
    assert end_of_turn_id(again, {}) == 2


def _folder(tmp_path: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(tmp_path / "changed")
    return tmp_path / "changed"


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (normalizers.Lowercase(), "'Hello World' comes back as 'hello world'"),
        (normalizers.StripAccents(), None),  # of what there are none in the texts
        (normalizers.Replace(Regex(r"\s+"), " "), "comes back as 'def f(x): if x: return x '"),
        (normalizers.NFKC(), "'你好，世界！' comes back as '你好,世界!'"),
    ],
)
def test_a_tokenizer_that_changes_ordinary_text_is_refused(
    bpe_tokenizer: Any, tmp_path: Path, normalizer: Any, text: str | None
) -> None:
    bpe_tokenizer.backend_tokenizer.normalizer = normalizer
    folder = _folder(tmp_path, bpe_tokenizer)
    if text is None:
        load_tokenizer(folder)
        return
    with pytest.raises(ModelError, match=re.escape(text)) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_space_in_front_and_characters_known_as_unknown_are_no_reason(tmp_path: Path, char_folder: Path) -> None:
    vocab = {"<unk>": 0, "▁": 1, **{c: i + 2 for i, c in enumerate(dict.fromkeys("HeloWrdIt's3'ck:nw,?df(x)if"))}}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.add_special_tokens(["<unk>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert load_tokenizer(_folder(tmp_path, tokenizer)) is not None
    assert load_tokenizer(char_folder) is not None


def test_characters_without_a_token_are_counted(write_jsonl: Callable[..., Path], char_folder: Path) -> None:
    rows = [{"text": text} for text in ("the fox", "ŵ the ŵ", "<|endoftext|>", "ŷ <|endoftext|>")]
    path = write_jsonl("a.jsonl", rows)
    for policy in ("text", "special"):
        data = DataConfig.model_validate({"path": str(path), "store": str(path.parent), "special_in_text": policy})
        store = build_store([str(path)], stage="pretrain", tokenizer=load_tokenizer(char_folder), data=data)
        notes = [
            note for note in store.report.findings.notes(store.files) if "typed" not in note and "begin" not in note
        ]
        # As plain text a control token has characters without a token here, too.
        lacks = sum(c not in load_tokenizer(char_folder).get_vocab() for c in "<|endoftext|>")
        extra = lacks if policy == "text" else 0
        assert notes[0].startswith(f"{3 if extra else 2} rows with characters that the tokenizer lacks")
        assert notes[1].startswith(f"{3 + 2 * extra} tokens that stand for such characters ({path}:2")


def test_byte_level_tokenizers_lack_no_character(bpe_tokenizer: Any) -> None:
    assert Encoder(bpe_tokenizer).unknown_id is None
