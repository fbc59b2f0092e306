"""Whatever a recipe says about its data decides the name of their store, unless it is known not to."""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

from pertoken import Recipe
from pertoken.data.formats import FORMATS, Format
from pertoken.data.store.build import build_store
from pertoken.data.store.key import DO_NOT_DECIDE, StoreKey
from pertoken.data.store.store import Store
from pertoken.data.tokens.encode import Encoder
from pertoken.data.tokens.tokenizer import load_tokenizer
from pertoken.recipe.data import DataConfig

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "old_run"
DECIDE = [name for name in DataConfig.model_fields if name not in DO_NOT_DECIDE]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(OLD_RUN / "tokenizer")


def key(tokenizer: Any, stage: Any = "sft", /, **data: Any) -> StoreKey:
    config = DataConfig.model_validate({"path": ["a.jsonl"], **data})
    return StoreKey.of([Path("a.jsonl")], config, stage=stage, tokenizer=tokenizer, encoder=Encoder(tokenizer))


def other(value: Any, annotation: Any) -> Any:
    """A value of the type that is not `value`."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    made = {
        bool: lambda: not value,
        int: lambda: (value or 0) + 1,
        float: lambda: (value or 0.0) + 0.5,
        str: lambda: f"{value}x",
        dict: lambda: {**value, "x": 1},
        tuple: lambda: (*value, "x"),
    }
    return made[typing.get_origin(kind) or kind]()


@pytest.mark.parametrize("name", DECIDE)
def test_every_setting_changes_the_key_unless_it_is_known_not_to_decide(tokenizer: Any, name: str) -> None:
    field = DataConfig.model_fields[name]
    default = field.get_default(call_default_factory=True)
    special: dict[str, Any] = {"format": "messages", "columns": {"prompt": "q"}, "template_date": "2026-01-31"}
    value = special[name] if name in special else other(default, field.annotation)
    before, after = key(tokenizer), key(tokenizer, **{name: value})
    assert after.name(["sha"]) != before.name(["sha"])
    assert after.fingerprint(["sha"]) != before.fingerprint(["sha"])


def test_what_is_known_not_to_decide_is_a_setting_and_changes_nothing(tokenizer: Any) -> None:
    assert DO_NOT_DECIDE.keys() <= DataConfig.model_fields.keys()
    said = {"path": "b.jsonl", "eval_path": "c.jsonl", "workers": 3, "store": "there", "tokenizer": "moved"}
    assert key(tokenizer, **said).name(["sha"]) == key(tokenizer).name(["sha"])


def test_the_tail_that_is_cut_off_documents_decides(tokenizer: Any) -> None:
    tails = [{"eval_split": "tail", "eval_fraction": fraction} for fraction in (0.1, 0.2)]
    rows = {"eval_split": "rows", "eval_fraction": 0.1}
    assert len({key(tokenizer, "pretrain", **split).name(["sha"]) for split in (*tails, rows)}) == 3
    assert key(tokenizer, **rows).name(["sha"]) == key(tokenizer).name(["sha"])


def test_defaults_are_those_of_this_version_of_the_samples() -> None:
    """Settings at their default are not in the key. Who changes a default raises `_VERSION` in store/key.py, and what
    stands here; who adds a setting adds its default."""
    defaults = {name: DataConfig.model_fields[name].get_default(call_default_factory=True) for name in DECIDE}
    assert defaults == {
        "format": "auto",
        "text_key": "text",
        "prompt_key": "prompt",
        "completion_key": "completion",
        "columns": {},
        "ignore": (),
        "supervise": "all",
        "template_kwargs": {},
        "template_date": None,
        "end_of_turn": None,
        "on_rewrite": "split",
        "reasoning": "error",
        "max_seq_len": 1024,
        "overlong": "drop",
        "on_bad_row": "error",
        "special_in_text": "text",
        "document": "file",
        "newlines": "lf",
    }


def test_a_new_format_makes_a_store_again_where_rows_of_unknown_formats_were_skipped(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    skipping, strict = {"on_bad_row": "skip"}, {"on_bad_row": "error"}
    named = {**skipping, "format": "messages"}
    before = [key(tokenizer, **data) for data in (skipping, strict, named)]
    assert [found.fingerprint_v2(["sha"]) is None for found in before] == [True, False, False], "it had fewer formats"
    read = FORMATS["messages"].read
    monkeypatch.setitem(FORMATS, "new", Format("new", "conversation", ("new",), read))
    after = [key(tokenizer, **data) for data in (skipping, strict, named)]
    same = [a.name(["sha"]) == b.name(["sha"]) for a, b in zip(before, after, strict=True)]
    assert same == [False, True, True]


def old_store(tmp_path: Path, tokenizer: Any, /, **data: Any) -> tuple[Store, dict[str, Any]]:
    """The store that a resume of the old run makes, and what its checkpoint says of it."""
    state = json.loads((OLD_RUN / "checkpoints" / "step-00000004" / "trainer_state.json").read_text())
    recipe = Recipe.parse(state["recipe"])
    config = recipe.data.model_copy(update={"store": str(tmp_path / "store"), **data})
    files = [str(OLD_RUN / "chats.jsonl")]
    return build_store(files, stage=recipe.stage, tokenizer=tokenizer, data=config), state["data"]


def test_a_checkpoint_of_the_earlier_version_is_of_the_same_data(tmp_path: Path, tokenizer: Any) -> None:
    store, saved = old_store(tmp_path, tokenizer)
    assert saved["train"] in store.fingerprints
    assert saved["train"] != store.fingerprint
    again, _ = old_store(tmp_path, tokenizer)
    assert (again.report.hit, again.fingerprints) == (True, store.fingerprints)
    changed, _ = old_store(tmp_path, tokenizer, max_seq_len=600)
    assert saved["train"] not in changed.fingerprints


def test_earlier_versions_found_the_turns_of_other_templates_otherwise(tokenizer: Any, tmp_path: Path) -> None:
    other = load_tokenizer(OLD_RUN / "tokenizer", chat_template=tokenizer.chat_template + " ")
    for stage, of, known in (("sft", tokenizer, True), ("sft", other, False), ("pretrain", other, True)):
        for fingerprint in (StoreKey.fingerprint_v2, StoreKey.fingerprint_v3, StoreKey.earlier_name):
            assert (fingerprint(key(of, stage), ["sha"]) is not None) is known


def test_the_earlier_version_knows_no_setting_that_it_did_not_have(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a resume would accept other samples."""
    monkeypatch.setattr("pertoken.data.store.key._V2_SETTINGS", {"format", "on_bad_row"})
    assert key(tokenizer).fingerprint_v2(["sha"]) is not None
    assert key(tokenizer, max_seq_len=7).fingerprint_v2(["sha"]) is None
