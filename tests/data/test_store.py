from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.data.batch.pack import Sample
from pertoken.data.chat.render import ChatTemplate, chat_sample
from pertoken.data.formats import Conversation
from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.data.tokens.encode import Encoder
from pertoken.data.tokens.tokenizer import load_tokenizer
from pertoken.errors import DataError, RecipeError
from pertoken.recipe.data import DataConfig

WriteJsonl = Callable[..., Path]


def _build(
    paths: Path | Sequence[Path], tokenizer: Any, stage: Any = "sft", progress: Any = None, **data: Any
) -> Store:
    names = [str(path) for path in ([paths] if isinstance(paths, Path) else paths)]
    data.setdefault("store", str(Path(names[0]).parent / "cache"))
    config = DataConfig.model_validate({"path": names, **data})
    return build_store(names, stage=stage, tokenizer=tokenizer, data=config, on_progress=progress)


def _in(cache: Path) -> list[Path]:
    """What is in the cache, but for the hashes of files, which are kept there once a file is some seconds old."""
    return [path for path in cache.iterdir() if path.name != "hashes.json"]


def _chat(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": ["user", "assistant"][i % 2], "content": c} for i, c in enumerate(contents)]}


def _samples(store: Store) -> list[Sample]:
    return [store[i] for i in range(len(store))]


def _labels(store: Store, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(sample.labels[sample.loss_mask]) for sample in _samples(store)]


def test_every_conversation_is_the_sample_that_chat_makes_of_it(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    rows = [_chat(f"question {i}", "é🙂" * i, "again", f"answer {i}") for i in range(30)]
    store = _build(write_jsonl("chat.jsonl", ["", *rows]), bpe_tokenizer)
    template, encoder = ChatTemplate(bpe_tokenizer, {}), Encoder(bpe_tokenizer)
    assert len(store) == 30
    for i, row in enumerate(rows):
        sample = chat_sample(Conversation(row["messages"]), template, encoder)
        np.testing.assert_array_equal(store[i].tokens, sample.tokens)
        np.testing.assert_array_equal(store[i].loss_mask, sample.loss_mask)
        assert store.lengths[i] == len(sample)
        assert store.num_tokens[i] == sample.loss_mask.sum()
        assert store.num_bytes[i] == len(("é🙂" * i + f"answer {i}").encode())
        assert store.where(i).endswith(f"chat.jsonl:{i + 2}")
    assert store.report.rows == store.report.samples == 30
    assert (store.report.tokens, store.report.num_tokens) == (store.lengths.sum(), store.num_tokens.sum())
    assert store.report.notes() == ["formats: messages (30 rows)"]
    with pytest.raises(IndexError):
        store[30]


def test_samples_are_views_of_the_file(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    sample = _build(write_jsonl("chat.jsonl", [_chat("a", "b")]), bpe_tokenizer)[0]
    for array in (sample.tokens, sample.loss_mask):
        assert not array.flags.owndata
        assert not array.flags.writeable
    assert (sample.tokens.dtype, sample.loss_mask.dtype) == (np.int32, np.bool_)


_tokenizer = cache(load_tokenizer)


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), min_size=1, max_size=6),
    max_seq_len=st.integers(2, 20),
)
def test_pretraining_predicts_every_token_of_a_document_but_its_first_exactly_once(
    bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory, texts: list[str], max_seq_len: int
) -> None:
    tokenizer = _tokenizer(bpe_folder)
    path = tmp_path_factory.mktemp("pretrain") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    store = _build(path, tokenizer, "pretrain", max_seq_len=max_seq_len)
    for line, text in enumerate(texts, 1):
        document = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        mine = [i for i in range(len(store)) if store.where(i).endswith(f":{line}")]
        assert [token for i in mine for token in store[i].labels.tolist()] == document[1:]
        assert [token for i in mine for token in store[i].input_ids.tolist()] == document[:-1]
        assert len(mine) == math.ceil((len(document) - 1) / max_seq_len)
        first = len(tokenizer.decode(document[:1]).encode())
        if "\ufffd" not in tokenizer.decode(document[:1]):
            assert sum(store.num_bytes[mine]) == len(text.encode()) - first
    assert (store.num_tokens == store.lengths).all()
    assert store.lengths.max() <= max_seq_len
    assert all(sample.loss_mask.all() for sample in _samples(store))


def test_a_text_file_is_one_document_and_its_tail_another(tmp_path: Path, char_tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("The quick brown fox")
    whole = _build(path, char_tokenizer, "pretrain", max_seq_len=100)
    assert [char_tokenizer.decode(sample.tokens) for sample in _samples(whole)] == ["The quick brown fox<|im_end|>"]
    store = _build(path, char_tokenizer, "pretrain", max_seq_len=6, eval_split="tail", eval_fraction=0.3)
    train, evaluation = store.split(0.3, "tail")
    assert [char_tokenizer.decode(s.tokens) for s in _samples(train)] == ["The qui", "ick bro", "o<|im_end|>"]
    assert [char_tokenizer.decode(s.tokens) for s in _samples(evaluation)] == ["wn fox<|im_end|>"]
    assert [len(part) for part in ("The quick bro", "wn fox")] == [int(19 * 0.7), 6]


def test_a_document_of_one_token_is_counted_and_left_out(write_jsonl: WriteJsonl, char_tokenizer: Any) -> None:
    from tokenizers import normalizers

    char_tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    store = _build(write_jsonl("a.jsonl", [{"text": " "}, {"text": "a"}]), char_tokenizer, "pretrain")
    assert (len(store), store.report.by_file[0].too_short) == (1, 1)
    assert store.report.notes() == [
        "formats: text (2 rows)",
        f"1 document of a single token dropped ({store.files[0]}:1)",
    ]


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_the_same_samples_come_from_jsonl_and_parquet(
    write_jsonl: WriteJsonl, tmp_path: Path, bpe_tokenizer: Any, stage: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [_chat("a", f"b{i}") if stage == "sft" else {"text": f"b{i}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    left = _build(write_jsonl("a.jsonl", rows), bpe_tokenizer, stage)
    right = _build(tmp_path / "a.parquet", bpe_tokenizer, stage)
    for a, b in zip(_samples(left), _samples(right), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)


OVERLONG = [_chat("a", "b"), _chat("a", "b" * 40), _chat("a" * 40, "b")]  # fits; answer too long; answer beyond


@pytest.mark.parametrize(
    ("overlong", "labels", "counts"),
    [
        ("drop", ["b<|im_end|>"], {"overlong": 2, "truncated": 0, "unsupervised": 0}),
        ("truncate", ["b<|im_end|>", "b" * 11], {"overlong": 0, "truncated": 1, "unsupervised": 1}),
    ],
)
def test_overlong_conversations_are_counted(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, overlong: str, labels: list[str], counts: dict[str, int]
) -> None:
    prompt = len(bpe_tokenizer("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n").input_ids)
    store = _build(write_jsonl("a.jsonl", OVERLONG), bpe_tokenizer, overlong=overlong, max_seq_len=prompt + 10)
    assert _labels(store, bpe_tokenizer) == labels
    assert {name: getattr(store.report.by_file[0], name) for name in counts} == counts
    assert store.lengths.max() <= prompt + 10
    assert len(store.report.notes()) == 1 + sum(count > 0 for count in counts.values())


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_overlong_error_lists_the_rows(write_jsonl: WriteJsonl, bpe_tokenizer: Any, on_bad_row: str) -> None:
    path = write_jsonl("a.jsonl", OVERLONG)
    with pytest.raises(DataError) as error:
        _build(path, bpe_tokenizer, overlong="error", max_seq_len=45, on_bad_row=on_bad_row)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{path}:2: data.max_seq_len: ")
    assert lines[0].endswith('more than 45; raise it, or set data.overlong to "drop" or "truncate" (lines 2-3)')
    assert len(lines) == 1  # skipping bad rows would not help


BAD = ['{"messages": [}', {"text": "x"}, _chat("a"), {"messages": [{"role": "bot", "content": ""}]}]


def test_bad_rows_are_listed_by_cause(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    first, second = write_jsonl("a.jsonl", [_chat("a", "b"), *BAD]), write_jsonl("b.jsonl", BAD * 10)
    with pytest.raises(DataError) as error:
        _build([first, second], bpe_tokenizer)
    lines = str(error.value).splitlines()
    places = [f"{first}:{i}:" for i in (2, 3, 4, 5)] + [f"{second}:{i}:" for i in (1, 2, 3, 4)]
    assert [line.split(" ")[0] for line in lines[:8]] == places
    assert lines[7].endswith(" (lines 4, 8, 12, 16, 20, 24, 28, 32, 36 and 40)")
    assert lines[8:] == ['data.on_bad_row="skip" trains on the other rows']
    assert not _in(first.parent / "cache")


def test_skipping_is_not_offered_where_every_row_is_bad(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [{"text": "x"}] * 30)
    with pytest.raises(DataError) as error:
        _build(path, bpe_tokenizer)
    (line,) = str(error.value).splitlines()
    assert line.endswith('train with stage = "pretrain", or split it into messages (lines 1-20 and 10 more)')


@pytest.mark.parametrize("workers", [1, 2])
def test_formats_are_counted_over_files(write_jsonl: WriteJsonl, bpe_tokenizer: Any, workers: int) -> None:
    first = write_jsonl("a.jsonl", [{"instruction": "?", "output": "!"}] * 1000)
    second = write_jsonl(
        "b.jsonl", [{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}]
    )
    for _ in range(2):  # the second time from the cache
        store = _build([first, second], bpe_tokenizer, workers=workers)
        assert store.report.notes() == ["formats: alpaca (1,000 rows), sharegpt (1)"]


def test_a_column_that_no_row_has_is_an_error(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    rows = [{"instruction": "?", "output": "!"}, {"instruction": "?", "output": "!", "role": "Be brief."}]
    path = write_jsonl("a.jsonl", rows)
    store = _build(path, bpe_tokenizer, columns={"system": "role"})
    assert bpe_tokenizer.decode(store[1].tokens).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    with pytest.raises(DataError, match=r"^data\.columns: no row has 'rolle'; write the name as it is in the file$"):
        _build(path, bpe_tokenizer, columns={"system": "rolle"})
    with pytest.raises(DataError, match=r"^data\.columns: no row has 'a', 'b'"):
        _build(path, bpe_tokenizer, columns={"prompt": "a", "completion": "b"}, on_bad_row="skip")


def test_skipped_rows_are_counted_and_all_listed_in_a_file(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [*BAD * 10, _chat("a", "é")])
    for hit in (False, True):
        store = _build(path, bpe_tokenizer, on_bad_row="skip")
        assert store.report.hit is hit
        assert (store.report.rows, store.report.samples, store.report.skipped) == (41, 1, 40)
        assert store.report.skipped_file is not None
        listed = Path(store.report.skipped_file).read_text(encoding="utf-8").splitlines()
        assert [line.split(" ")[0] for line in listed] == [f"{path}:{i}:" for i in range(1, 41)]
        assert store.report.notes()[1:] == [
            f"40 bad rows skipped, listed in {store.report.skipped_file} ({path}:1, 2, 3, ...)"
        ]


def test_a_template_that_fails_on_a_row_makes_it_a_bad_row(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    bpe_tokenizer.chat_template += "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    path = write_jsonl("a.jsonl", [_chat("a", "b"), _chat("a", "b", "c", "d")])
    with pytest.raises(DataError, match=r"a\.jsonl:2: conversation: the chat template cannot render it \(too long\);"):
        _build(path, bpe_tokenizer)


def test_no_sample_at_all_is_an_error_that_says_why(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [*BAD, _chat("a", "b" * 99)])
    with pytest.raises(DataError, match=r"a\.jsonl: no sample results \(rows 5, skipped 4, overlong 1\); see data"):
        _build(path, bpe_tokenizer, on_bad_row="skip", max_seq_len=8)
    assert not _in(path.parent / "cache")


def test_a_document_needs_an_eos_token(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    bpe_tokenizer.eos_token = None
    with pytest.raises(RecipeError, match=r"data\.tokenizer: has no eos token"):
        _build(write_jsonl("a.jsonl", [{"text": "x"}]), bpe_tokenizer, "pretrain")


def test_a_second_build_opens_the_first_and_any_change_builds_anew(
    write_jsonl: WriteJsonl, bpe_folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    path = write_jsonl("a.jsonl", [_chat("a", "b"), _chat("c", "d")])
    first = _build(path, tokenizer)
    again = _build(path, load_tokenizer(bpe_folder), eval_fraction=0.5)  # how it is split does not matter
    assert (first.report.hit, again.report.hit) == (False, True)
    assert again.fingerprint == first.fingerprint
    seen = {first.fingerprint}
    for change in (
        {"max_seq_len": 64},
        {"overlong": "truncate"},
        {"on_bad_row": "skip"},
        {"format": "messages"},
        {"template_kwargs": {"x": 1}},
        {"prompt_key": "question"},
        {"text_key": "body"},
    ):
        store = _build(path, tokenizer, **change)
        assert not store.report.hit, change
        seen.add(store.fingerprint)
    for other in (
        load_tokenizer(bpe_folder, add_tokens=["<x>"]),
        load_tokenizer(bpe_folder, chat_template=tokenizer.chat_template + " "),
    ):
        seen.add(_build(path, other).fingerprint)
    renamed = path.rename(path.with_name("b.jsonl"))
    moved = _build(renamed, tokenizer)
    assert moved.fingerprint == first.fingerprint, "the same content, elsewhere"
    assert moved.where(0).endswith("b.jsonl:1")
    write_jsonl("b.jsonl", [_chat("a", "b"), _chat("c", "e")])
    changed = _build(renamed, tokenizer)
    assert _labels(changed, tokenizer) == ["b<|im_end|>", "e<|im_end|>"]
    seen.add(changed.fingerprint)
    assert len(seen) == 11


def test_encoding_with_truncation_meanwhile_does_not_change_the_fingerprint(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any
) -> None:
    path = write_jsonl("a.jsonl", [_chat("a", "b")])
    _build(path, bpe_tokenizer)
    bpe_tokenizer("some text", truncation=True, max_length=2)
    assert _build(path, bpe_tokenizer).report.hit


def test_the_default_cache_is_the_users(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("a.jsonl", [_chat("a", "b")])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    store = _build(path, bpe_tokenizer, store=None)
    assert len(store) == 1
    assert len(list((tmp_path / "xdg" / "pertoken").glob("*/store.json"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    _build(path, bpe_tokenizer, store=None)
    assert len(list((tmp_path / "home" / ".cache" / "pertoken").glob("*/store.json"))) == 1


def test_a_damaged_or_half_made_store_is_built_anew(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [_chat("a", "b")])
    _build(path, bpe_tokenizer)
    (folder,) = _in(path.parent / "cache")
    for name, content in (("samples.arrow", b"ARROW1"), ("store.json", b"{}"), ("store.json", b"\xff")):
        (folder / name).write_bytes(content)
        assert not _build(path, bpe_tokenizer).report.hit
        assert _build(path, bpe_tokenizer).report.hit
    (folder / "store.json").unlink()
    assert not _build(path, bpe_tokenizer).report.hit


def test_a_store_that_another_process_finished_first_is_taken(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [_chat("a", "b")])

    def other_process(done: int, total: int) -> None:
        _build(path, bpe_tokenizer)

    store = _build(path, bpe_tokenizer, progress=other_process)
    assert _labels(store, bpe_tokenizer) == ["b<|im_end|>"]
    assert len(_in(path.parent / "cache")) == 1


def test_an_interrupted_build_leaves_nothing(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [_chat("a", "b")])

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _build(path, bpe_tokenizer, progress=interrupt)
    assert not _in(path.parent / "cache")


def test_a_cache_that_cannot_be_written_is_an_error(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [_chat("a", "b")])
    with pytest.raises(DataError, match=r"data\.store=.*a\.jsonl.*: cannot be written"):
        _build(path, bpe_tokenizer, store=str(path))


def test_progress_rises_to_all_bytes(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    files = [write_jsonl(name, [_chat("a", "b")] * 1500 + ["", ""]) for name in ("a.jsonl", "b.jsonl")]
    told: list[tuple[int, int]] = []
    _build(files, bpe_tokenizer, progress=lambda done, total: told.append((done, total)))
    total = sum(file.stat().st_size for file in files)
    assert len(told) >= 3
    assert told == sorted(told)
    assert {t for _, t in told} == {total}
    assert told[-1][0] >= total - 2


def test_record_batches_of_any_number_hold_the_same_samples(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl("a.jsonl", [_chat("a", "b" * i) for i in range(50)])
    one = _build(path, bpe_tokenizer)
    monkeypatch.setattr("pertoken.data.store.columns._BATCH_TOKENS", 64)
    many = _build(path, bpe_tokenizer, store=str(path.parent / "other"))
    for a, b in zip(_samples(one), _samples(many), strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.loss_mask, b.loss_mask)
    assert [one.where(i) for i in range(50)] == [many.where(i) for i in range(50)]
    np.testing.assert_array_equal(one.lengths, many.lengths)
    np.testing.assert_array_equal(one.num_bytes, many.num_bytes)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.97])
def test_a_split_by_rows_keeps_rows_and_their_duplicates_on_one_side(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, fraction: float
) -> None:
    rows = [{"text": f"the text number {i % 40}, long enough for two samples"} for i in range(60)]
    store = _build(write_jsonl("a.jsonl", rows), bpe_tokenizer, "pretrain", max_seq_len=16)
    train, evaluation = store.split(fraction, "rows")

    def texts(part: Store) -> set[str]:
        return {rows[int(part.where(i).rsplit(":", 1)[1]) - 1]["text"] for i in range(len(part))}

    assert len(train) + len(evaluation) == len(store)
    assert not texts(train) & texts(evaluation)
    assert len(texts(evaluation)) == max(1, round(40 * fraction))
    for part in (train, evaluation):
        np.testing.assert_array_equal(part.lengths, [len(sample) for sample in _samples(part)])
        np.testing.assert_array_equal(part.num_tokens, [sample.loss_mask.sum() for sample in _samples(part)])


def test_a_split_depends_on_the_rows_contents_alone(write_jsonl: WriteJsonl, bpe_tokenizer: Any) -> None:
    rows = [_chat("a", f"answer {i}") for i in range(40)]
    forward = _build(write_jsonl("a.jsonl", rows), bpe_tokenizer).split(0.2, "rows")[1]
    backward = _build(write_jsonl("b.jsonl", rows[::-1]), bpe_tokenizer).split(0.2, "rows")[1]
    assert sorted(_labels(forward, bpe_tokenizer)) == sorted(_labels(backward, bpe_tokenizer))
    assert len(forward) == 8


@pytest.mark.parametrize(
    ("rows", "fraction", "eval_split"),
    [(["a"], 0.5, "rows"), (["a", "a"], 0.5, "rows"), (["a", "b"], 0.9, "rows"), (["a", "b"], 0.5, "tail")],
)
def test_an_impossible_split_names_the_setting_and_the_ways_out(
    write_jsonl: WriteJsonl, bpe_tokenizer: Any, rows: list[str], fraction: float, eval_split: Any
) -> None:
    store = _build(write_jsonl("a.jsonl", [{"text": row + " text"} for row in rows]), bpe_tokenizer, "pretrain")
    with pytest.raises(DataError, match=rf'data\.eval_fraction={fraction}: .* data\.eval_path .*eval_split="tail"'):
        store.split(fraction, eval_split)


def test_a_token_outside_the_vocabulary_is_named_with_its_row(write_jsonl: WriteJsonl, char_tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", [{"text": text} for text in ["abc", *["The 🙂"] * 25]])
    store = _build(path, char_tokenizer, "pretrain")
    vocab_size = char_tokenizer.convert_tokens_to_ids("🙂")
    store.check_vocab(vocab_size + 1)
    with pytest.raises(DataError) as error:
        store.check_vocab(vocab_size)
    lines = str(error.value).splitlines()
    assert lines[0] == (
        f"{path}:2: tokens: token id {vocab_size} is outside the model's vocabulary of {vocab_size}; "
        "use the model's own tokenizer or raise model.vocab_size (lines 2-21)"
    )
    assert lines[1:] == ["and 5 more"]


def test_gsm8k_becomes_one_sample_a_row(minimind_tokenizer: Any, shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "sft" / "gsm8k" / "test.jsonl"
    keys = {"prompt_key": "question", "completion_key": "answer"}
    store = _build(path, minimind_tokenizer, store=str(tmp_path), **keys)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(store) == store.report.rows == len(rows) == 1319
    assert _labels(store, minimind_tokenizer) == [row["answer"] + "<|im_end|>" for row in rows]
    assert store.num_bytes.tolist() == [len(row["answer"].encode()) for row in rows]
