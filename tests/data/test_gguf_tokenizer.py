"""The tokenizer in a GGUF file is the one that the model was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf_cases import byte_level_tokenizer, package, tokenizer_keys
from tokenizers import AddedToken, pre_tokenizers

from pertoken import load_tokenizer
from pertoken.data.chat.template import end_of_turn_id
from pertoken.data.tokens.tokenizer import bos_of, open_tokenizer
from pertoken.errors import ModelError

TEXTS = [
    "Hello World",
    "12345 and  678, or 3.14",
    "a  b   c\n\n  d\te ",
    " It's 3 o'clock: does she know, or not?",
    "def f(x):\n    if x:\n\treturn  x\n",
    "今天天气很好。👩‍🚀 e\u0301",
    "<|im_start|>user\nhi<|im_end|>",
]
SPACE = "\u2581"


def write(path: Path, keys: dict[str, Any]) -> Path:
    """A GGUF file without weights; a key that is None is left out."""
    writer = package().GGUFWriter(path, "llama")
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_byte_level_tokenizer_encodes_as_the_one_that_was_written(tmp_path):
    backend = byte_level_tokenizer()
    tokenizer = load_tokenizer(write(tmp_path / "t.gguf", tokenizer_keys(backend)))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=True) == backend.encode(text).ids, text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (
        1,
        2,
        0,
        0,
    )
    assert end_of_turn_id(tokenizer, {}) == 2
    assert bos_of(tokenizer) is None


def test_digits_are_split_off_before_all_else(tmp_path):
    """The spaces before a number are one piece, as SmolLM's tokenizer has it and GPT-2's has not."""
    backend = byte_level_tokenizer()
    keys = tokenizer_keys(backend)
    keys["tokenizer.ggml.tokens"] += ["ĠĠ", "12"]
    keys["tokenizer.ggml.token_type"] += [1, 1]
    keys["tokenizer.ggml.merges"] += ["Ġ Ġ", "1 2"]
    pieces = {}
    for pre in ("smollm", "gpt-2"):
        tokenizer = load_tokenizer(write(tmp_path / f"{pre}.gguf", keys | {"tokenizer.ggml.pre": pre}))
        pieces[pre] = tokenizer.tokenize("x  12")
    assert pieces == {"smollm": ["x", "ĠĠ", "1", "2"], "gpt-2": ["x", "Ġ", "Ġ", "12"]}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("qwen2", ["ab", "Ġc", "1", "2", "3", "4"]),
        ("llama-bpe", ["ab", "Ġc", "123", "4"]),
        ("dbrx", ["ab", "Ġc", "12", "3", "4"]),  # 123 is no merge, and a piece is not looked up as a whole
        ("tekken", ["ab", "Ġc", "1", "2", "3", "4"]),
    ],
)
def test_each_name_stands_for_its_own_pieces(pre, pieces, tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|end|>", *alphabet, "ab", "Ġc", "12", "123"]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["a b", "Ġ c", "1 2"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }
    tokenizer = load_tokenizer(write(tmp_path / "t.gguf", keys))
    assert tokenizer.tokenize("ab c1234") == pieces
    assert bos_of(tokenizer) == (0 if pre in ("llama-bpe", "tekken") else None)
    without = load_tokenizer(write(tmp_path / "no.gguf", keys | {"tokenizer.ggml.add_bos_token": False}))
    assert bos_of(without) is None
    both = keys | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert load_tokenizer(write(tmp_path / "both.gguf", both)).encode("ab") == [0, tokens.index("ab"), 0]


def test_what_fills_the_vocabulary_up_is_no_token(tmp_path):
    keys = tokenizer_keys(byte_level_tokenizer())
    count = len(keys["tokenizer.ggml.tokens"])
    keys["tokenizer.ggml.tokens"] += ["<think>", "[PAD331]", "[PAD332]"]
    keys["tokenizer.ggml.token_type"] += [4, 5, 5]
    tokenizer = load_tokenizer(write(tmp_path / "t.gguf", keys))
    assert len(tokenizer) == count + 1
    assert tokenizer.encode("<think>") == [count]
    assert not tokenizer.added_tokens_decoder[count].special


def sentencepiece_keys() -> dict[str, Any]:
    """A vocabulary like Llama 2's: control, bytes, a token of the user's, words. Scores fall as they are listed, ids as
    they do not."""
    words = ["he", "ll", f"{SPACE}he", "hell", "hello", f"{SPACE}hello", "lo", *"helo12", SPACE][::-1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "    ", *words]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-1000.0] + [float(i) - len(words) for i in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [4] + [1] * len(words),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_merges_by_score_and_spells_the_rest_in_bytes(tmp_path):
    keys = sentencepiece_keys() | {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = load_tokenizer(write(tmp_path / "t.gguf", keys))
    cases = {
        "hello": ["<s>", "hello"],
        " hello": ["<s>", f"{SPACE}he", "ll", "o"],  # which is merged before "hell"
        "hello 1": ["<s>", "hello", SPACE, "1"],
        "helo": ["<s>", "he", "lo"],  # "he" has the higher score
        "é": ["<s>", "<0xC3>", "<0xA9>"],
        "he     1": ["<s>", "he", "    ", SPACE, "1"],
        "</s>he": ["<s>", "</s>", "he"],
    }
    for text, tokens in cases.items():
        ids = tokenizer.encode(text)
        assert tokenizer.convert_ids_to_tokens(ids) == tokens, text
        assert tokenizer.decode(ids[1:]) == text
    assert bos_of(tokenizer) == 1
    before = load_tokenizer(write(tmp_path / "before.gguf", sentencepiece_keys()))
    assert before.tokenize("he    he") == [f"{SPACE}he", "    ", "he"]  # a space before the whole text alone
    assert before.decode(before.encode("hello", add_special_tokens=False)) == "hello"


def test_it_is_saved_as_a_folder_that_transformers_opens(tmp_path):
    import transformers

    for name, keys in (("a", tokenizer_keys(byte_level_tokenizer())), ("b", sentencepiece_keys())):
        tokenizer = open_tokenizer(write(tmp_path / f"{name}.gguf", keys), add_tokens=["<new>"])
        tokenizer.save_pretrained(tmp_path / name)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        for text in [*TEXTS, "a<new>b"]:
            assert again.encode(text) == tokenizer.encode(text)
        assert again.chat_template == keys.get("tokenizer.chat_template")
        assert again.all_special_ids == tokenizer.all_special_ids
        assert AddedToken("<new>", special=True, normalized=False) == tokenizer.added_tokens_decoder[len(tokenizer) - 1]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "pre": ({"tokenizer.ggml.pre": "jais"}, "tokenizer.ggml.pre='jais': how text is split is not known"),
    "no pre": ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre='default': how text is split is not known"),
    "model": (
        {"tokenizer.ggml.model": "t5"},
        r"tokenizer.ggml.model='t5': pertoken reads byte-pair encodings \(gpt2, l",
    ),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens: missing"),
    "no merges": ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges: missing"),
    "no model": ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model: missing"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type: not one for each token"),
    "an id": ({"tokenizer.ggml.eos_token_id": 4000}, "tokenizer.ggml.eos_token_id=4000: there are 330 tokens"),
    "a merge of none": ({"tokenizer.ggml.merges": ["q zzz"]}, "its tokenizer cannot be built"),
    "half a merge": ({"tokenizer.ggml.merges": ["q"]}, "its tokenizer cannot be built"),
    "numbers": ({"tokenizer.ggml.tokens": [1] * 330}, "tokenizer.ggml.token_type: not one for each token"),
    "scores": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores: missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_built_is_refused_in_one_line(case, tmp_path):
    changes, words = WRONG[case]
    path = write(tmp_path / "t.gguf", tokenizer_keys(byte_level_tokenizer()) | changes)
    with pytest.raises(ModelError, match=words) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_loses_letters_is_refused(tmp_path):
    keys = tokenizer_keys(byte_level_tokenizer()) | {"tokenizer.ggml.unknown_token_id": None}
    tokens = keys["tokenizer.ggml.tokens"]
    keys["tokenizer.ggml.merges"] = [merge for merge in keys["tokenizer.ggml.merges"] if "W" not in merge]
    keys["tokenizer.ggml.tokens"] = [f"no-{i}" if "W" in token else token for i, token in enumerate(tokens)]
    with pytest.raises(ModelError, match="'Hello World' comes back as 'Hello orld'"):
        load_tokenizer(write(tmp_path / "t.gguf", keys))
