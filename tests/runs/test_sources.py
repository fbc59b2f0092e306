"""Several sources: each sample as often an epoch as its source says, held out, evaluated and proved by source."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import MODEL, World, rows_of, untimed

import pertoken
from pertoken import Recipe
from pertoken.audit import audit
from pertoken.audit.audit import write_samples
from pertoken.data.batch.order import step_at, steps_per_epoch
from pertoken.errors import DataError, RecipeError
from pertoken.prove.run import prove
from pertoken.runs.data import prepare
from pertoken.tracking.rows import StepRow
from pertoken.tracking.trackers.tracker import finite_figures

WORDS = "red green blue cat dog sun moon one two three".split()


def _files(folder: Path) -> dict[str, str]:
    """40 chats, 30 rows of other columns, 20 Alpaca rows."""
    rng = random.Random(0)

    def words(i: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(2, 9)) + [WORDS[int(digit)] for digit in str(i)])

    def chat(i: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": words(i)}, {"role": "assistant", "content": words(i)}]

    rows: dict[str, list[dict[str, Any]]] = {
        "chats": [{"messages": chat(i)} for i in range(40)],
        "asked": [{"frage": words(i), "antwort": words(i), "url": "x"} for i in range(30)],
        "tasks": [{"instruction": words(i), "output": words(i)} for i in range(20)],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return {name: str(folder / f"{name}.jsonl") for name in rows}


def _values(world: World, folder: Path, sources: list[dict[str, Any]], **train: Any) -> dict[str, Any]:
    return {
        "stage": "sft",
        "out_dir": str(folder / "run"),
        "model": dict(MODEL),
        "data": {
            "tokenizer": str(world.folder / "tokenizer"),
            "store": str(folder / "store"),
            "max_seq_len": 300,
            "sources": sources,
        },
        "train": {"batch_size": 8, "dtype": "float32", "device": "cpu", "learning_rate": 1e-3, **train},
    }


def _sources(folder: Path) -> list[dict[str, Any]]:
    files = _files(folder)
    return [
        {"path": files["chats"], "eval_fraction": 0.2},
        {
            "path": files["asked"],
            "repeat": 3,
            "columns": {"prompt": "frage", "completion": "antwort"},
            "ignore": ["url"],
            "eval_fraction": 0.1,
        },
        {"path": files["tasks"], "name": "half", "fraction": 0.5},
    ]


def test_each_sample_comes_exactly_as_often_an_epoch_as_its_source_says(world: World, tmp_path: Path) -> None:
    recipe = Recipe.parse(_values(world, tmp_path, _sources(tmp_path)))
    train, evaluation = prepare(recipe)
    assert evaluation is not None
    assert [(part.name, len(part.store), part.repeat) for part in train.parts] == [
        ("chats", 32, 1),
        ("asked", 27, 3),
        ("half", 10, 1),
    ]
    assert [(part.name, len(part.store)) for part in evaluation.parts] == [("chats", 8), ("asked", 3)]
    assert len(train) == 32 + 3 * 27 + 10
    held_out = {evaluation.where(i) for i in range(len(evaluation))}
    steps = steps_per_epoch(len(train), 8)
    for epoch in range(2):
        ids = [
            i
            for step in range(steps)
            for i in step_at(1 + epoch * steps + step, num_samples=len(train), batch_size=8, seed=42).sample_ids
        ]
        seen = Counter(train.where(i) for i in ids)
        assert set(seen.values()) == {1, 3}
        assert all(count == (3 if "asked" in where else 1) for where, count in seen.items())
        assert not held_out & seen.keys()
    for i in range(len(train)):
        part, own = train.locate(i)
        assert train[i].tokens.tolist() == part.store[own].tokens.tolist()
        assert (train.lengths[i], train.num_tokens[i]) == (len(train[i]), train[i].num_tokens)
    assert train.count() == sum(train[i].num_tokens for i in range(len(train)))
    notes = "\n".join(train.notes())
    assert "asked 3 x 27 samples" in notes
    assert "half: chosen: 10 of 20 distinct rows" in notes


def test_a_subset_is_the_same_in_every_build_and_grows_by_adding_rows(world: World, tmp_path: Path) -> None:
    path = Path(_files(tmp_path)["chats"])

    def rows(**choice: Any) -> set[str]:
        values = _values(world, tmp_path, [{"path": str(path), **choice}])
        train, _ = prepare(Recipe.parse(values))
        lines = path.read_text().splitlines()
        return {lines[int(train.where(i).rpartition(":")[2]) - 1] for i in range(len(train))}

    ten, twenty = rows(max_rows=10), rows(fraction=0.5)
    assert (len(ten), len(twenty), len(rows(max_rows=1000))) == (10, 20, 40)
    assert ten < twenty
    lines = path.read_text().splitlines()
    random.Random(1).shuffle(lines)
    path.write_text("".join(f"{line}\n" for line in [*lines, lines[0]]))  # another order, and a duplicate
    assert rows(max_rows=10) == ten


def test_losses_are_reported_by_source_and_add_up(world: World, tmp_path: Path) -> None:
    recipe = Recipe.parse(_values(world, tmp_path, _sources(tmp_path), max_steps=6, eval_interval=3))
    pertoken.train(recipe)
    _, evaluation = prepare(recipe)
    assert evaluation is not None
    (third, last) = [row for row in rows_of(tmp_path / "run") if "eval_loss" in row]
    counts = {part.name: part.store.count() for part in evaluation.parts}
    for row in (third, last):
        assert row["eval_sources"].keys() == {"chats", "asked"}
        total = sum(row["eval_sources"][name] * count for name, count in counts.items()) / sum(counts.values())
        assert abs(row["eval_loss"] - total) < 1e-12 * total
    read = StepRow.from_json(last)
    assert read is not None
    assert finite_figures(read)["eval/asked/loss"] == last["eval_sources"]["asked"]


def test_a_resume_is_bitwise_and_another_mixture_is_refused(world: World, tmp_path: Path) -> None:
    values = _values(world, tmp_path, _sources(tmp_path), max_steps=8, eval_interval=4, schedule="constant")
    values["checkpoint"] = {"save_interval": 4}
    whole = pertoken.train(Recipe.parse(values))
    values["out_dir"] = str(tmp_path / "again")
    values["train"]["max_steps"] = 4
    pertoken.train(Recipe.parse(values))
    values["train"]["max_steps"] = 8
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(values["data"]["sources"][0]["path"]).read_bytes())
    values["data"]["sources"][0] |= {"path": str(moved), "name": "chats"}
    again = pertoken.train(Recipe.parse(values), resume=True)
    one, two = (load_file(result.checkpoint / "model.safetensors") for result in (whole, again))
    assert all(np.array_equal(one[name].numpy(), two[name].numpy()) for name in one)
    assert untimed(rows_of(tmp_path / "run"))[4:] == untimed(rows_of(tmp_path / "again"))[4:]
    values["data"]["sources"][1]["repeat"] = 2
    with pytest.raises(RecipeError) as refused:
        pertoken.train(Recipe.parse(values), resume=True)
    assert str(refused.value).startswith("data.sources.1.repeat=2: was 3 when step-")
    assert "\n" not in str(refused.value)
    values["data"]["sources"][1]["repeat"] = 3
    without = {**values, "data": {**values["data"], "sources": values["data"]["sources"][:2]}}
    with pytest.raises(
        RecipeError, match=r"^data\.sources=\['chats', 'asked'\]: was \['chats', 'asked', 'half'\] when"
    ):
        pertoken.train(Recipe.parse(without), resume=True)
    moved.write_text(moved.read_text().replace("red", "sun", 1))
    with pytest.raises(pertoken.errors.CheckpointError, match="training data is not what"):
        pertoken.train(Recipe.parse(values), resume=True)


def test_the_proof_reads_each_row_as_its_source_says(world: World, tmp_path: Path) -> None:
    recipe = Recipe.parse(_values(world, tmp_path, _sources(tmp_path)))
    names = ("every sample once an epoch", "rows, token by token", "who is supervised", "one micro-batch")
    proof = prove(recipe, tokens=200, only=names)
    assert [(result.name, result.verdict) for result in proof.results] == [(name, "passed") for name in names]


def test_the_audit_lists_sources_and_writes_each_sample_once(world: World, tmp_path: Path) -> None:
    result = audit(Recipe.parse(_values(world, tmp_path, _sources(tmp_path))))
    files = [(file.source, file.repeat, file.rows, file.samples) for file in result.parts[0].files]
    assert files == [("chats", 1, 40, 32), ("asked", 3, 30, 27), ("half", 1, 20, 10)]
    write_samples(result, tmp_path / "samples.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert Counter(row["epoch_repeat"] for row in rows) == {1: 42, 3: 27}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data": {"path": "a.jsonl"}}, r"data\.path=\['a.jsonl'\]: \[\[data\.sources\]\] are given too"),
        ({"sources": []}, r"data\.path: missing; name the data, or add \[\[data\.sources\]\]"),
        ({"sources": {"path": "a.jsonl"}}, r"data\.sources=.*: give each source a section .* in double brackets"),
        ({"source": {"repeat": 0}}, r"data\.sources\.0\.repeat=0: must be at least 1"),
        ({"source": {"repeats": 2}}, r"data\.sources\.0\.repeats: unknown key; did you mean data\.sources\.repeat\?"),
        ({"source": {"max_rows": 5, "fraction": 0.5}}, "max_rows=5: fraction=0.5 is given too; keep one of the two"),
        ({"source": {"format": "alpaka"}}, r"data\.sources\.0\.format: .*alpaca"),
        ({"source": {"format": "text"}}, 'data.format="text": stage = "sft" reads conversations'),
        ({"source": {"name": "half"}}, "another source has it"),
        ({"source": {"name": "a b"}}, "a name has letters"),
        ({"data": {"eval_path": "e.jsonl"}}, r"eval_fraction=0\.2: data\.eval_path is given too"),
    ],
)  # fmt: skip
def test_each_mistake_is_named(world: World, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    values = _values(world, tmp_path, _sources(tmp_path))
    values["data"] |= change.get("data", {})
    values["data"]["sources"] = change.get("sources", values["data"]["sources"])
    if "source" in change:
        values["data"]["sources"][0] |= change["source"]
    with pytest.raises(RecipeError, match=says):
        Recipe.parse(values)


def test_a_file_in_two_sources_is_refused(world: World, tmp_path: Path) -> None:
    path = _files(tmp_path)["chats"]
    sources = [{"path": path}, {"path": str(tmp_path / "chats*.jsonl"), "name": "again"}]
    with pytest.raises(DataError, match=r"in two of \[\[data\.sources\]\], chats and again; .* repeat = 2"):
        prepare(Recipe.parse(_values(world, tmp_path, sources)))


def test_a_source_is_overridden_by_its_place(world: World, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(Recipe.parse(_values(world, tmp_path, _sources(tmp_path))).to_toml())
    recipe = Recipe.load(path, ["data.sources.1.repeat=5", "data.sources.0.supervise=last"])
    assert [source.repeat for source in recipe.data.sources] == [1, 5, 1]
    assert recipe.data.settings_of("chats").supervise == "last"
    assert recipe.data.settings_of("asked").columns == {"prompt": "frage", "completion": "antwort"}
    for wrong in ("data.sources.7.repeat=5", "data.sources.repeat=5"):
        with pytest.raises(RecipeError, match="from 0"):
            Recipe.load(path, [wrong])


def _copied(folder: Path, *, last: int = 10) -> list[dict[str, Any]]:
    """A second file that begins with the rows of the first and has so many of its own."""
    chats = Path(_files(folder)["chats"])
    asked = [{"prompt": f"red {i}", "completion": f"blue {i}"} for i in range(last)]
    more = folder / "more.jsonl"
    more.write_text(chats.read_text() + "".join(json.dumps(row) + "\n" for row in asked))
    return [{"path": str(chats), "eval_fraction": 0.2}, {"path": str(more)}]


def test_a_row_that_one_source_holds_out_is_trained_through_no_other(world: World, tmp_path: Path) -> None:
    recipe = Recipe.parse(_values(world, tmp_path, _copied(tmp_path)))
    train, evaluation = prepare(recipe)
    assert evaluation is not None
    trained = np.concatenate([part.store.row_digests for part in train.parts])
    held_out = np.concatenate([part.store.row_digests for part in evaluation.parts])
    assert len(held_out) == 8
    assert not np.isin(held_out, trained).any()
    assert len(train) == 32 + 32 + 10
    assert any(
        "more: chosen: all rows but 8, left out of training: other sources hold them out" in note
        for note in train.notes()
    )
    assert prepare(recipe)[0].fingerprint == train.fingerprint
    sources = _copied(tmp_path)
    sources[0]["eval_fraction"] = 0.1
    assert prepare(Recipe.parse(_values(world, tmp_path, sources)))[0].fingerprint != train.fingerprint


def test_a_source_of_which_other_sources_hold_out_every_row_is_refused(world: World, tmp_path: Path) -> None:
    sources = _copied(tmp_path, last=0)
    rows = Path(sources[1]["path"]).read_text().splitlines(keepends=True)
    _, evaluation = prepare(Recipe.parse(_values(world, tmp_path, sources[:1])))
    assert evaluation is not None
    places = {int(evaluation.where(i).rpartition(":")[2]) for i in range(len(evaluation))}
    Path(sources[1]["path"]).write_text("".join(rows[line - 1] for line in sorted(places)))
    with pytest.raises(DataError, match="other sources hold out every row of more"):
        prepare(Recipe.parse(_values(world, tmp_path, sources)))


def test_the_audit_finds_rows_that_stand_in_two_sources(world: World, tmp_path: Path) -> None:
    sources = [{**source, "eval_fraction": 0} for source in _copied(tmp_path)]
    problems = {problem.kind: problem for problem in audit(Recipe.parse(_values(world, tmp_path, sources))).problems}
    assert problems["duplicate"].count == 40
    assert problems["duplicate"].places[0].endswith("more.jsonl:1")


def test_a_copy_of_a_file_under_another_name_is_no_second_source(world: World, tmp_path: Path) -> None:
    chats = Path(_files(tmp_path)["chats"])
    (tmp_path / "copy.jsonl").write_bytes(chats.read_bytes())
    sources = [{"path": str(chats)}, {"path": str(tmp_path / "copy.jsonl")}]
    says = r"copy\.jsonl: the same content as .*chats\.jsonl, in two of .*, chats and copy; .* repeat = 2"
    with pytest.raises(DataError, match=says):
        prepare(Recipe.parse(_values(world, tmp_path, sources)))
