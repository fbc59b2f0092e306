"""Bytes that nobody thought of: readers, recipes and model folders answer with their own errors, and lose nothing good.

PERTOKEN_FUZZ=n tries n times as many examples.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pertoken import Recipe
from pertoken.data.chat.render import ChatTemplate, rendered_chat
from pertoken.data.files.records import BadRow, Record, read_records
from pertoken.data.formats import formats_that_give, to_conversation, to_text
from pertoken.data.store.parts import scan
from pertoken.data.tokens.tokenizer import load_tokenizer
from pertoken.errors import DataError, ModelError, RecipeError
from pertoken.folders.open import load_folder, save_folder
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig

TIMES = int(os.environ.get("PERTOKEN_FUZZ", "1"))


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=examples * TIMES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


# Rows

_scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["user", "assistant"])
)
_keys = st.sampled_from(["messages", "conversations", "prompt", "completion", "text", "role", "content", "tools",
                         "tool_calls", "reasoning_content", ""])  # fmt: skip
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_keys, inner, max_size=4), max_leaves=12
)
_message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "owl"]), "content": _scalars})
_rows = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(_message | _values, max_size=3)}),
    st.fixed_dictionaries({"prompt": _scalars, "completion": _scalars}),
    st.fixed_dictionaries({"text": _values}),
    st.dictionaries(_keys, _values, max_size=3),
)
_lines = st.one_of(
    _rows.map(lambda row: json.dumps(row).encode()),
    _rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")),
    st.binary(max_size=12),
    st.tuples(_rows, st.binary(max_size=3), st.integers(0, 200)).map(
        lambda parts: json.dumps(parts[0]).encode()[: parts[2]] + parts[1] + json.dumps(parts[0]).encode()[parts[2] :]
    ),
)


def _simple(raw: bytes) -> dict[str, Any] | None:
    """The object in a line if it is good JSON, by the plainest means there are."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        value = json.loads(raw.rstrip().decode(), object_pairs_hook=unique)
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@fuzz(300)
@given(lines=st.lists(_lines, min_size=1, max_size=6), end=st.sampled_from([b"\n", b"\r\n"]))
def test_every_good_line_is_read_as_it_is_and_every_other_one_is_named(
    tmp_path: Path, lines: list[bytes], end: bytes
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(end.join(lines))
    expected = {}
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            expected[number] = _simple(line)
    if not expected:
        with pytest.raises(DataError, match="empty"):
            list(read_records(path))
        return
    scan([path])
    found = {row.line: row.value if isinstance(row, Record) else None for row in read_records(path)}
    assert found == expected


@cache
def _template(folder: Path) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(folder), {})


@fuzz(300)
@given(row=_rows, format=st.sampled_from(["auto", *formats_that_give("conversation")]))
def test_any_object_is_a_conversation_or_a_bad_row_in_one_line(bpe_folder: Path, row: Any, format: str) -> None:
    record = Record("a.jsonl", 3, row, digest=0, end=0)
    for made in (to_text(record), to_conversation(record, format)):
        if isinstance(made, BadRow):
            assert str(made).startswith("a.jsonl:3: ")
            assert str(made).isprintable()
        elif not isinstance(made, str):
            with suppress(ValueError):  # which becomes a bad row too
                rendered_chat(made, _template(bpe_folder))


@fuzz(200)
@given(content=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".txt", ".parquet"]))
def test_any_bytes_are_rows_bad_rows_or_an_error_of_the_data(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with suppress(DataError):
        scan([path])
    with suppress(DataError):
        for row in read_records(path):
            assert str(row if isinstance(row, BadRow) else row.value)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    rows = [{"text": f"row {i}", "messages": [{"role": "user", "content": "x" * i}], "n": i} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=8)
    return path.read_bytes()


@fuzz(200)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), max_size=4), cut=st.floats(0, 1))
def test_a_parquet_file_with_changed_bytes_raises_no_other_error(
    tmp_path: Path, parquet: bytes, edits: list[tuple[float, bytes]], cut: float
) -> None:
    content = bytearray(parquet if cut < 0.8 else parquet[: int(len(parquet) * (cut - 0.8) * 5)])
    for at, change in edits:
        start = int(at * len(content))
        content[start : start + len(change)] = change
    path = tmp_path / "a.parquet"
    path.write_bytes(bytes(content))
    with suppress(DataError):
        scan([path])
    with suppress(DataError):
        for row in read_records(path):
            assert str(row if isinstance(row, BadRow) else row.value)


# Recipes

_toml = st.recursive(
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["sft", "pretrain", "a.jsonl"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_sections = st.fixed_dictionaries(
    {},
    optional={
        "stage": st.sampled_from(["sft", "pretrain"]) | _toml,
        "out_dir": _toml,
        "init_from": _toml,
        "data": st.dictionaries(st.sampled_from(["path", "tokenizer", "format", "template_kwargs", "bad"]), _toml)
        | _toml,
        "train": st.dictionaries(st.sampled_from(["seed", "betas", "batch_size", "epochs", "device"]), _toml) | _toml,
        "model": st.dictionaries(st.sampled_from(["hidden_size", "num_experts", "rope_theta"]), _toml) | _toml,
        "log": _toml,
    },
)


@fuzz(200)
@given(content=st.binary(max_size=40) | st.text(max_size=40).map(lambda t: t.encode(errors="surrogatepass"))
       | _sections.map(lambda values: tomli_w.dumps(values).encode(errors="surrogatepass")),
       overrides=st.lists(st.text(max_size=20) | st.tuples(
           st.sampled_from(["data.path", "train.seed", "a.b", "stage", "data.template_kwargs.x"]), st.text(max_size=12)
       ).map("=".join), max_size=2))  # fmt: skip
def test_any_recipe_is_one_or_is_refused_in_words(tmp_path: Path, content: bytes, overrides: list[str]) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with suppress(RecipeError):
        assert Recipe.load(path, overrides).to_toml()


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 5000,
        "a = " + "[" * 400 + "]" * 400,
        "a." * 3000 + "b = 1",
        "a = " + "9" * 5000,
        "[train]\nseed = 0x" + "f" * 5000,
        "[data.template_kwargs]\nx = 99999999999999999999",
        '"\\u001b[2J\\nx" = 1',
    ],
)
def test_a_recipe_nested_too_deep_or_with_absurd_numbers_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError) as error:
        Recipe.load(tmp_path / "recipe.toml")
    assert all(line.isprintable() and len(line) < 500 for line in str(error.value).splitlines())


# Model folders

_CONFIG = ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
           "vocab_size", "intermediate_size", "rope_parameters", "rope_scaling", "rope_theta", "layer_types", "dtype",
           "quantization_config", "tie_word_embeddings", "rms_norm_eps", "hidden_act", "architectures",
           "max_position_embeddings", "sliding_window", "use_moe", "num_experts", "auto_map"]  # fmt: skip
_sizes = st.sampled_from([0, -1, 1, 10**9, 10**18, 10**30, 2.5])
_json = st.recursive(
    _scalars | _sizes | st.sampled_from(["llama", "mixtral", "gpt2", "minimind"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["rope_type", "x"]), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    save_folder(CausalLM(ModelConfig.model_validate(sizes).resolve(20)), folder, eos_token_id=1)
    return folder


@pytest.fixture
def changed(model_folder: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


@fuzz(150)
@given(changes=st.dictionaries(st.sampled_from(_CONFIG), _json, min_size=1, max_size=3))
def test_any_configuration_is_a_model_or_is_refused(model_folder: Path, changed: Path, changes: dict[str, Any]) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | changes))
    with suppress(ModelError):
        load_folder(changed)


@fuzz(100)
@given(content=st.binary(max_size=40) | _values.map(lambda value: json.dumps(value).encode()))
def test_any_config_file_is_refused(changed: Path, content: bytes) -> None:
    (changed / "config.json").write_bytes(content)
    with pytest.raises(ModelError):
        load_folder(changed)


@fuzz(150)
@given(
    header=st.dictionaries(
        st.sampled_from(["model.norm.weight", "model.embed_tokens.weight", "__metadata__", "x"]),
        st.fixed_dictionaries(
            {"dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "F33"]),
             "shape": st.lists(st.sampled_from([0, 1, 4, 16, 10**6, 10**18, -1]), max_size=3),
             "data_offsets": st.lists(st.sampled_from([0, 4, 64, 10**12, -4]), min_size=2, max_size=2)}
        ) | _json,
        max_size=3,
    ),
    length=st.integers(0, 200) | st.sampled_from([2**31, 2**63]) | st.none(),
)  # fmt: skip
def test_any_header_of_weights_is_refused(changed: Path, header: dict[str, Any], length: int | None) -> None:
    text = json.dumps(header).encode()
    size = len(text) if length is None else length
    (changed / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + b"\0" * 64)
    with pytest.raises(ModelError):
        load_folder(changed)


_TOKENIZER = ["version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor",
              "decoder", "model"]  # fmt: skip


@fuzz(60)
@given(
    file=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]),
    changes=st.dictionaries(st.sampled_from([*_TOKENIZER, "chat_template", "eos_token", "tokenizer_class",
                                             "additional_special_tokens", "auto_map"]), _json, min_size=1, max_size=2),
)  # fmt: skip
def test_any_tokenizer_folder_is_one_or_is_refused(
    char_folder: Path, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(char_folder, folder, dirs_exist_ok=True)
    values = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(values | changes))
    with suppress(ModelError, RecipeError):
        ChatTemplate(load_tokenizer(folder), {})
