from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_versions import only_5

from pertoken.data.chat.template import end_of_turn_id
from pertoken.data.store.key import _tokenizer_identity
from pertoken.data.tokens.encode import Encoder
from pertoken.data.tokens.tokenizer import as_transformers, load_tokenizer, open_tokenizer, special_ids
from pertoken.data.tokens.train import train_tokenizer
from pertoken.data.tokens.trained import CHATML, TrainedTokenizer
from pertoken.errors import ModelError
from pertoken.families import recipe_names
from pertoken.folders.weights import save_folder
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig

KINDS = ("bpe_folder", "char_folder")
TEXTS = (
    "",
    "a",
    "The quick brown fox, 12,345  of them.\n\n",
    "naïve café — 今天 👩‍🚀 ¿",
    "<|im_start|>user\nA<|im_end|>\n<|endoftext|> <|im_end|>",
)


def assert_same(ours: TrainedTokenizer, theirs: Any) -> None:
    """Every answer of ours is transformers'."""
    assert isinstance(ours, TrainedTokenizer)
    assert not isinstance(theirs, TrainedTokenizer)
    assert len(ours) == len(theirs)
    for name in ("special_tokens_map", "added_tokens_decoder", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.unk_token_id, ours.pad_token_id) == (theirs.unk_token_id, theirs.pad_token_id)
    assert special_ids(ours) == special_ids(theirs)
    assert _tokenizer_identity(ours, Encoder(ours)) == _tokenizer_identity(theirs, Encoder(theirs))
    assert end_of_turn_id(ours, {}) == end_of_turn_id(theirs, {})
    assert ours.get_chat_template() == theirs.get_chat_template()
    ids = range(len(ours))
    assert [ours.convert_ids_to_tokens(i) for i in ids] == theirs.convert_ids_to_tokens(list(ids))
    for text in TEXTS:
        for special in (True, False):
            tokens = ours.encode(text, add_special_tokens=special)
            assert tokens == theirs.encode(text, add_special_tokens=special) == theirs(text).input_ids
            read_back = ours.decode(tokens, skip_special_tokens=special)
            assert read_back == theirs.decode(tokens, skip_special_tokens=special)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_folder_opened_without_transformers_answers_as_with_it(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    assert_same(open_tokenizer(folder), load_tokenizer(folder))
    assert_same(open_tokenizer(folder), as_transformers(open_tokenizer(folder)))
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    assert_same(open_tokenizer(folder, chat_template=template), load_tokenizer(folder, chat_template=template))
    assert open_tokenizer(folder, chat_template="chatml").chat_template == CHATML


@only_5
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_those_that_transformers_writes(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    tokenizer = open_tokenizer(request.getfixturevalue(kind))
    tokenizer.save_pretrained(tmp_path / "ours")
    as_transformers(tokenizer).save_pretrained(tmp_path / "theirs")
    ours, theirs = ({f.name: f.read_bytes() for f in (tmp_path / who).iterdir()} for who in ("ours", "theirs"))
    config = theirs.pop("tokenizer_config.json").replace(b'"TokenizersBackend"', b'"PreTrainedTokenizerFast"')
    assert ours == theirs | {"tokenizer_config.json": config}, "but for a class that version 4 knows too"


def test_a_folder_with_the_class_that_was_written_before_is_still_ours(char_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(char_folder, tmp_path, dirs_exist_ok=True)
    change("tokenizer_config.json", lambda c: c.update(tokenizer_class="TokenizersBackend"))(tmp_path)
    assert_same(open_tokenizer(tmp_path), load_tokenizer(tmp_path))


FAMILIES = (
    *({"family": name} for name in recipe_names(use_moe=False)),
    *({"family": name, "use_moe": True} for name in recipe_names(use_moe=True)),
)


@pytest.mark.parametrize("changes", FAMILIES, ids=str)
@pytest.mark.parametrize("saved_by", [open_tokenizer, pytest.param(load_tokenizer, marks=only_5)])  # 4 writes more
def test_a_model_beside_the_tokenizer_changes_nothing(
    changes: dict[str, Any], saved_by: Callable[[Path], Any], char_folder: Path, tmp_path: Path
) -> None:
    experts = {"num_experts": 2, "moe_intermediate_size": 8} if "use_moe" in changes else {}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    tokenizer = saved_by(char_folder)
    model = CausalLM(ModelConfig(**sizes, **changes, **experts).resolve(len(tokenizer)))
    save_folder(model, tmp_path, tokenizer=tokenizer, eos_token_id=2)
    assert_same(open_tokenizer(tmp_path), load_tokenizer(tmp_path))


def change(file: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        edit(values)
        (folder / file).write_text(json.dumps(values))

    return changed


def write(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


CHANGES = {
    "another token ends a text": change("tokenizer_config.json", lambda c: c.update(eos_token="<|endoftext|>")),
    "one more special token": change("tokenizer_config.json", lambda c: c.update(extra_special_tokens=["<x>"])),
    "an unknown setting": change("tokenizer_config.json", lambda c: c.update(split_special_tokens=True)),
    "another class": change("tokenizer_config.json", lambda c: c.update(tokenizer_class="LlamaTokenizer")),
    "a setting less": change("tokenizer_config.json", lambda c: c.pop("pad_token")),
    "a normalizer": change("tokenizer.json", lambda t: t.update(normalizer={"type": "NFC"})),
    "one more added token": change(
        "tokenizer.json", lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 9, "content": "x"})
    ),
    "spaces beside a special token": change("tokenizer.json", lambda t: t["added_tokens"][2].update(lstrip=True)),
    "truncation": change(
        "tokenizer.json",
        lambda t: t.update(truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
    ),
    "a beginning of text": change(
        "tokenizer.json",
        lambda t: t["post_processor"].update(single=[{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}]),
    ),
    "dropout": change("tokenizer.json", lambda t: t["model"].update(dropout=0.5)),
    "another map of special tokens": write("special_tokens_map.json", '{"eos_token": "<|endoftext|>"}'),
    "more added tokens": write("added_tokens.json", '{"<x>": 0}'),
    "another model": write("config.json", '{"model_type": "gpt2"}'),
    "a model that says otherwise": write("config.json", '{"model_type": "qwen3", "tokenizer_class": "GPT2Tokenizer"}'),
    "no config": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no JSON": write("tokenizer.json", "{"),
    "a list": write("tokenizer_config.json", "[]"),
    "nested without end": write("tokenizer.json", "[" * 100_000),
    "a vocabulary of words": change("tokenizer.json", lambda t: t["model"].update(vocab="abc")),
    "bytes that are no text": lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff") and None,
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_a_folder_with_anything_else_in_it_is_transformers_to_open(
    changed: Callable[[Path], None], char_folder: Path, tmp_path: Path
) -> None:
    load_tokenizer(char_folder)
    open_tokenizer(char_folder).save_pretrained(tmp_path)
    assert TrainedTokenizer.open(tmp_path) is not None
    changed(tmp_path)
    assert TrainedTokenizer.open(tmp_path) is None


def test_what_transformers_cannot_open_either_is_its_error(tmp_path: Path, char_folder: Path) -> None:
    open_tokenizer(char_folder).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*it needs a tokenizer\.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        open_tokenizer(tmp_path / "missing")
    assert len(open_tokenizer(char_folder, add_tokens=["<x>"])) == len(open_tokenizer(char_folder)) + 1


def test_training_returns_what_opening_the_folder_gives(text_file: Path, tmp_path: Path) -> None:
    trained = train_tokenizer([text_file], vocab_size=300, out_dir=tmp_path / "t")
    assert_same(trained, load_tokenizer(tmp_path / "t"))
