"""`pertoken audit` finds what would be lost or trained wrongly, by file and line, and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny import MODEL, World
from tiny import pertoken as command

import pertoken.data.samples
from pertoken import Recipe
from pertoken.audit import Audit, audit
from pertoken.audit.audit import write_samples
from pertoken.data.findings import KINDS
from pertoken.data.formats import Conversation

WORDS = "red green blue cat dog sun moon one two three runs sleeps eats sings near under over".split()


def _chat(*contents: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], **more}


def _good_rows(count: int) -> list[dict[str, Any]]:
    """Different rows of four formats, with several turns and contents that look like mistakes and are none."""
    rng = random.Random(0)

    def words(i: int) -> str:
        return f"{' '.join(rng.choices(WORDS, k=rng.randint(3, 20)))} {i}"

    rows: list[dict[str, Any]] = []
    for i in range(count):
        system = {"role": "system", "content": words(i)}
        kinds: tuple[dict[str, Any], ...] = (
            _chat(words(i), words(i)),
            _chat(words(i), words(i), words(i), words(i)),
            {"messages": [system, *_chat(words(i), words(i))["messages"]]},
            {"instruction": words(i), "input": "" if i % 2 else words(i), "output": words(i)},
            {"conversations": [{"from": "human", "value": words(i)}, {"from": "gpt", "value": words(i)}]},
            {"prompt": words(i), "completion": "x" if i % 3 else words(i)},
            _chat("is <im_end> or <|end a token?", f"no, {i} < 7 | 8 > 5"),
        )
        rows.append(kinds[i % len(kinds)])
    return rows


LONG = " ".join(["sun"] * 400)
PLAIN = (  # has no place for calls and reasoning
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
PLANTED: list[tuple[str, Any, str]] = [  # (kind, row, what the problem says)
    ("bad_row", "{'messages': []}", "single quotes"),
    ("bad_row", '{"messages": [], }', "comma"),
    ("bad_row", '{"prompt": "a", "completion": "b"} {"prompt": "c", "completion": "d"}', "several"),
    ("bad_row", '{"prompt": "a", "prompt": "b", "completion": "c"}', "twice"),
    ("bad_row", [1, 2], ""),
    ("bad_row", {"messages": []}, "empty"),
    ("bad_row", _chat("only a question"), "no assistant turn"),
    ("bad_row", {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]}, "content"),
    (
        "bad_row",
        {"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "x"}]},
        "narrator",
    ),
    ("bad_row", {"prompt": "a", "completion": 7}, "completion"),
    ("bad_row", {"nothing": "known"}, ""),
    ("bad_row", {"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
    ("bad_row", _chat("see", "it", images=["a.png"]), "images"),
    (
        "bad_row",
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": "maybe"}]},
        "train",
    ),
    (
        "bad_row",
        {"messages": [*_chat("1 + 1?")["messages"], {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
        "add",
    ),
    (
        "bad_row",
        {"messages": [*_chat("why?")["messages"], {"role": "assistant", "content": "so", "reasoning": "think"}]},
        "reasoning",
    ),
    ("overlong", _chat("long", LONG), "longer"),
    ("overlong", {"prompt": LONG, "completion": "short"}, "longer"),
    (
        "bad_row",
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]},
        "weight 0",
    ),
    ("empty_answer", _chat("say nothing", ""), "empty"),
    ("replacement_characters", _chat("the caf\ufffd", "is open"), "U+FFFD"),
    ("replacement_characters", {"prompt": "write", "completion": "na\ufffdve"}, "U+FFFD"),
    ("rendered_before", _chat("<|im_start|>user\nhi<|im_end|>", "hello"), "rendered"),
    ("typed_as_text", _chat("what is <|im_end|>?", "a token"), "control tokens"),
    ("roles_out_of_order", {"messages": [{"role": "user", "content": "one"}, *_chat("two", "three")["messages"]]}, ""),
    (
        "roles_out_of_order",
        {"messages": [*_chat("one", "two")["messages"], {"role": "assistant", "content": "three"}]},
        "",
    ),
    ("assistant_first", {"messages": [{"role": "assistant", "content": "Hi"}, *_chat("who", "me")["messages"]]}, ""),
    ("empty_message", _chat("", "what?"), "empty"),
    ("duplicate", None, "already"),
    ("unused_key", _chat("where from", "here", source="web"), "source"),
]


def _recipe(world: World, tmp_path: Path, **data: Any) -> Recipe:
    values = {
        "tokenizer": str(world.folder / "tokenizer"),
        "store": str(tmp_path / "store"),
        "max_seq_len": 600,
        **data,
    }
    return Recipe.model_validate(
        {"stage": "sft", "out_dir": str(tmp_path / "run"), "model": dict(MODEL), "data": values}
    )


def _found(result: Audit) -> set[tuple[str, str]]:
    return {(problem.kind, place) for problem in result.problems for place in problem.places}


def test_thirty_planted_problems_among_a_thousand_rows_are_found_and_nothing_else(
    bpe_folder: Path, world: World, tmp_path: Path
) -> None:
    rows: list[Any] = _good_rows(1000)
    lines = sorted(random.Random(1).sample(range(100, 1030), len(PLANTED)))
    for line, (_, row, _) in zip(lines, PLANTED, strict=True):
        rows.insert(line - 1, row if row is not None else rows[line % 90])
    path = tmp_path / "chats.jsonl"
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    result = audit(_recipe(world, tmp_path, path=str(path), tokenizer=str(bpe_folder), chat_template=PLAIN))

    assert len(PLANTED) == 30
    expected = {(kind, f"{path}:{line}") for line, (kind, _, _) in zip(lines, PLANTED, strict=True)}
    # Text of a template within a message is also a control token that is typed there.
    expected |= {("typed_as_text", place) for kind, place in expected if kind == "rendered_before"}
    assert _found(result) == expected
    for line, (kind, _, says) in zip(lines, PLANTED, strict=True):
        (problem,) = [p for p in result.problems if p.kind == kind and f"{path}:{line}" in p.places]
        assert says in problem.what
    (train,) = result.parts
    (file,) = train.files
    assert (file.rows, file.skipped, file.overlong, file.unsupervised) == (1030, 17, 2, 0)
    assert file.samples == train.samples == sum(train.lengths["counts"]) == 1030 - 17 - 2
    assert not result.ok


def test_good_data_have_no_problem(bpe_folder: Path, world: World, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _good_rows(300)))
    result = audit(_recipe(world, tmp_path, path=str(path), tokenizer=str(bpe_folder)))
    assert result.ok
    assert result.problems == ()
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_evaluation_data_are_looked_through_too(world: World, tmp_path: Path) -> None:
    train, other, held_out = (tmp_path / name for name in ("train.jsonl", "other.jsonl", "test.jsonl"))
    train.write_text("".join(json.dumps(_chat("one " * (i + 1), "two")) + "\n" for i in range(5)))
    other.write_text(json.dumps(_chat("no", "no")) + "\n" + json.dumps(_chat("three")) + "\n")
    held_out.write_text("".join(json.dumps(_chat("one " * (i + 1), "two")) + "\n" for i in range(4, 8)) + "{}\n")
    result = audit(_recipe(world, tmp_path, path=[str(train), str(other)], eval_path=str(held_out)))
    assert _found(result) == {("bad_row", f"{other}:2"), ("bad_row", f"{held_out}:5"), ("in_both", f"{held_out}:1")}
    rows = [[(Path(file.file).name, file.rows, file.samples) for file in part.files] for part in result.parts]
    assert rows == [[("train.jsonl", 5, 5), ("other.jsonl", 2, 1)], [("test.jsonl", 5, 4)]]
    split = audit(_recipe(world, tmp_path, path=str(train), eval_fraction=0.4))
    assert [(part.part, part.held_out, part.samples) for part in split.parts] == [
        ("train", False, 3),
        ("eval", True, 2),
    ]
    assert split.ok


def test_an_answer_that_is_cut_off_is_named(world: World, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(_chat("count", "one " * 200)) + "\n" + json.dumps(_chat("count", "one")) + "\n")
    result = audit(_recipe(world, tmp_path, path=str(path), overlong="truncate", max_seq_len=100))
    assert _found(result) == {("truncated", f"{path}:1")}
    result = audit(_recipe(world, tmp_path, path=str(path), overlong="error", max_seq_len=100))
    assert _found(result) == {("overlong", f"{path}:1")}


def test_an_end_that_is_not_supervised_is_named(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(_chat("hi", "hello", "bye", "see you")) + "\n")
    rendered_chat = pertoken.data.samples.rendered_chat

    def without_the_last_end(*args: Any) -> Any:
        rendered = rendered_chat(*args)
        text = rendered.samples[0]
        start, end, *weight = text.spans[-1]
        spans = [*text.spans[:-1], (start, end - len("<|im_end|>"), *weight)]
        return dataclasses.replace(rendered, samples=(dataclasses.replace(text, spans=spans),))

    monkeypatch.setattr(pertoken.data.samples, "rendered_chat", without_the_last_end)
    assert _found(audit(_recipe(world, tmp_path, path=str(path)))) == {
        ("end_not_supervised", f"{path}:1"),
        ("not_as_rendered", f"{path}:1"),
    }


def _without_calls(chat: Conversation) -> Conversation:
    messages = [{k: v for k, v in message.items() if k != "tool_calls"} for message in chat.messages]
    return dataclasses.replace(chat, messages=messages)


def _encoded_twice(chat: Conversation) -> Conversation:
    messages = copy.deepcopy(chat.messages)
    for message in messages:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(json.dumps(call["function"]["arguments"]))
    return dataclasses.replace(chat, messages=messages)


def _rewritten(chat: Conversation) -> Conversation:
    messages = [{**message, "content": message["content"].strip(".")} for message in chat.messages]
    return dataclasses.replace(chat, messages=messages)


def _last_only(chat: Conversation) -> Conversation:
    weights = [float(i == len(chat.messages) - 1) for i in range(len(chat.messages))]
    return dataclasses.replace(chat, weights=tuple(weights))


@pytest.mark.parametrize("change", [_without_calls, _encoded_twice, _rewritten, _last_only, "header"])
def test_a_mistake_of_the_code_is_found(bpe_folder: Path, world: World, tmp_path: Path, change: Any) -> None:
    """A call that is lost, arguments encoded twice, a history that is rewritten, a flag that nobody gave, a header that
    is learned."""
    path = tmp_path / "a.jsonl"
    calls = [*_chat("1 + 1?")["messages"], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    rows = [_chat("hi.", "hello.", "bye.", "see you."), {"messages": calls}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = _recipe(world, tmp_path, path=str(path), tokenizer=str(bpe_folder))
    rendered_chat = pertoken.data.samples.rendered_chat

    def mistaken(chat: Conversation, template: Any) -> Any:
        if callable(change):
            return rendered_chat(change(chat), template)
        rendered = rendered_chat(chat, template)
        spans = [[(start - 5, *more) for start, *more in text.spans] for text in rendered.samples]
        samples = [dataclasses.replace(text, spans=own) for text, own in zip(rendered.samples, spans, strict=True)]
        return dataclasses.replace(rendered, samples=tuple(samples))

    assert audit(recipe).ok
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pertoken.data.samples, "rendered_chat", mistaken)
        other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"store": str(tmp_path / "other")})})
        result = audit(other)
    assert not result.ok
    assert {problem.kind for problem in result.problems if problem.harms} <= {
        "not_as_rendered",
        "bad_row",
        "empty_answer",
    }


def test_samples_are_written_as_they_are_trained(world: World, tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "samples.jsonl"
    weighted = _chat("red sun", "blue moon", "one cat", "two dogs")
    weighted["messages"][3]["weight"] = 0.5
    path.write_text(json.dumps(_chat("hi", "one dog")) + "\n" + json.dumps(weighted) + "\n")
    result = audit(_recipe(world, tmp_path, path=str(path)))
    write_samples(result, out)
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first["source"] == f"{path}:1"
    assert first["epoch_repeat"] == 1
    tokenizer = result.data.tokenizer
    for row, learned in ((first, ["one dog<|im_end|>"]), (second, ["blue moon<|im_end|>", "two dogs<|im_end|>"])):
        assert [text for text, supervised in row["pieces"] if supervised] == learned
        labels = [i for i, weight in zip(row["input_ids"][1:], row["loss_mask"], strict=True) if weight]
        assert tokenizer.decode(labels, skip_special_tokens=False) == "".join(learned)
        assert "".join(text for text, _ in row["pieces"]) == tokenizer.decode(
            row["input_ids"], skip_special_tokens=False
        )
    assert set(first["loss_mask"]) == {0, 1}
    assert set(second["loss_mask"]) == {0.0, 0.5, 1.0}


def test_the_command_s_exit_code_says_whether_a_sample_would_be_lost(world: World, tmp_path: Path) -> None:
    recipe, path, out = tmp_path / "r.toml", tmp_path / "a.jsonl", tmp_path / "audit.json"
    path.write_text(json.dumps(_chat("red", "blue")) + "\n" + json.dumps(_chat("red")) + "\n")
    recipe.write_text(
        f'stage = "sft"\nout_dir = "{tmp_path / "run"}"\n[model]\nhidden_size = 32\nnum_hidden_layers = 1\n'
        f'num_attention_heads = 2\n[data]\npath = "{path}"\ntokenizer = "{world.folder / "tokenizer"}"\n'
        f'store = "{tmp_path / "store"}"\n'
    )
    code, said, problem = command("audit", str(recipe), "--json", str(out))
    assert code == 1
    assert "1 time a sample would be lost or trained wrongly" in problem
    assert f"{path}:2" in said
    values = json.loads(out.read_text())
    assert (values["ok"], values["format_version"], [p["kind"] for p in values["problems"]]) == (False, 1, ["bad_row"])
    path.write_text(json.dumps(_chat("red", "blue")) + "\n")
    assert command("audit", str(recipe), "--samples", str(tmp_path / "s.jsonl"))[0] == 0
    code, _, problem = command("audit", str(recipe), "--samples", str(tmp_path / "no" / "s.jsonl"))
    assert (code, problem.startswith(f"error: --samples {tmp_path}")) == (2, True)


def test_every_kind_says_how_many() -> None:
    for kind in KINDS.values():
        assert "7" in kind.said("7")


def test_the_page_has_every_kind_and_every_key(world: World, tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "audit.md").read_text(encoding="utf-8")
    for name, kind in KINDS.items():
        if name != "skipped":
            what = kind.said("N").replace("<", "\\<")
            assert f"| `{name}` | {what} | {'yes' if kind.harms else 'no'} |" in page
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(_chat("red", "blue")) + "\n" + json.dumps(_chat("red")) + "\n")
    values = audit(_recipe(world, tmp_path, path=str(path))).to_dict()
    nested = [values["parts"][0], values["parts"][0]["files"][0], values["plan"], values["estimate"]]
    nested += [values["problems"][0], values["examples"][0]]
    for key in {key for part in (values, *nested) for key in part}:
        assert f"`{key}`" in page, key


def test_the_start_of_training_lists_files_and_says_that_something_is_lost(world: World, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "held-out.jsonl")]
    for file in files:
        file.write_text("".join(json.dumps(_chat("red", "blue " * n)) + "\n" for n in (1, 2, 80)))
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'stage = "sft"\nout_dir = "{tmp_path / "run"}"\n[model]\nhidden_size = 32\nnum_hidden_layers = 1\n'
        f'num_attention_heads = 2\n[data]\npath = ["{files[0]}", "{files[1]}"]\neval_path = "{files[2]}"\n'
        f'tokenizer = "{world.folder / "tokenizer"}"\nstore = "{tmp_path / "store"}"\nmax_seq_len = 200\n'
    )
    code, said, problem = command("train", str(recipe), "train.max_steps=1", "train.device=cpu")
    assert code == 0, problem
    assert f"{files[0]}: 3 rows, 2 samples, 1 overlong" in said
    assert "evaluation data: 1 conversation longer than data.max_seq_len dropped" in said
    assert "3 times a sample is lost or trained otherwise than its row says; `pertoken audit` shows where" in said


def test_examples_are_of_evaluation_data_too(world: World, tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"
    train.write_text(json.dumps(_chat("red", "blue")) + "\n")
    held_out.write_text(json.dumps(_chat("one", "two")) + "\n" + json.dumps(_chat("three", "")) + "\n")
    result = audit(_recipe(world, tmp_path, path=str(train), eval_path=str(held_out)))
    assert [(example.source, example.why) for example in result.examples] == [
        (f"{train}:1", "the first sample"),
        (f"{held_out}:1", "the first sample of the evaluation data"),
        (f"{held_out}:2", "1 empty answer, so that the model learns to say nothing"),
    ]


def test_a_message_is_said_once_though_bad_rows_need_a_second_reading(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(_chat("red", "blue")) + "\n{}\n")
    (folder / "test.jsonl").write_text(json.dumps(_chat("one", "two")) + "\n")
    result = audit(_recipe(world, tmp_path, path=str(folder)))
    assert [remark for remark in result.remarks if "test.jsonl" in remark] == list(result.remarks)
    assert len(result.remarks) == 1
    recipe = tmp_path / "r.toml"
    recipe.write_text(_recipe(world, tmp_path, path=str(folder)).to_toml())
    assert command("audit", str(recipe))[1].count("not trained: test.jsonl") == 1


def test_evaluation_samples_are_worked_out_a_second_time_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"
    train.write_text(json.dumps(_chat("red", "blue")) + "\n")
    held_out.write_text(json.dumps(_chat("one.", "two.", "three", "one.")) + "\n")
    rendered_chat = pertoken.data.samples.rendered_chat
    monkeypatch.setattr(
        pertoken.data.samples, "rendered_chat", lambda chat, template: rendered_chat(_rewritten(chat), template)
    )
    result = audit(_recipe(world, tmp_path, path=str(train), eval_path=str(held_out)))
    assert _found(result) == {("not_as_rendered", f"{held_out}:1")}


def test_one_is_no_plural() -> None:
    assert KINDS["split"].said(1).startswith("1 conversation becomes several samples")
    assert KINDS["split"].said(1200).startswith("1,200 conversations become several samples")
    assert KINDS["in_both"].said(1) == "1 row of the evaluation data that is training data too"
