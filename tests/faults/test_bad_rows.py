"""Bad input of every kind: a message that says file and line, exit code 2, and with "skip" all but the bad row."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import World, pertoken

from pertoken import Recipe
from pertoken.data.files import limits
from pertoken.data.store.build import build_store
from pertoken.data.store.store import Store
from pertoken.data.tokens.tokenizer import load_tokenizer

MAX_LINE_BYTES = 200_000  # for these tests
USER, REPLY = {"role": "user", "content": "red cat"}, {"role": "assistant", "content": "blue dog"}
GOOD = {
    "sft": [{"messages": [USER, REPLY]}, {"messages": [USER, REPLY | {"content": "the moon sings"}]}],
    "pretrain": [{"text": "one red cat"}, {"text": "two blue dogs"}],
}


@dataclass(frozen=True)
class Kind:
    """One kind of bad input."""

    name: str
    write: Callable[[Path], Path]  # into a folder; returns the file
    message: str  # what follows `file:line: `, or `file: `
    stage: str = "sft"
    line: int | None = 2  # None: the file as a whole is none, and nothing of it can be kept


def _raw(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _line(name: str, bad: bytes, message: str, stage: str = "sft") -> Kind:
    """A bad line between two good ones."""
    first, last = (json.dumps(row).encode() for row in GOOD[stage])
    return Kind(name, _raw("rows.jsonl", b"\n".join([first, bad, last, b""])), message, stage)


def _row(name: str, bad: Any, message: str, stage: str = "sft") -> Kind:
    return _line(name, json.dumps(bad).encode(), message, stage)


def _messages(name: str, message: str, *messages: Any, **keys: Any) -> Kind:
    return _row(name, {"messages": list(messages), **keys}, message)


def _parquet(name: str, message: str, bad: Any, stage: str = "pretrain", type: Any = None) -> Kind:
    """A table of one column whose second row is bad."""

    def write(folder: Path) -> Path:
        (key,) = GOOD[stage][0]
        first, last = (row[key] for row in GOOD[stage])
        column = bad(first, last) if callable(bad) else pa.array([first, bad, last], type=type)
        pq.write_table(pa.table({key: column}), folder / "rows.parquet")
        return folder / "rows.parquet"

    return Kind(name, write, message, stage)


def _table(name: str, message: str, change: Callable[[bytes], bytes]) -> Kind:
    """A whole parquet file, changed."""

    def write(folder: Path) -> Path:
        pq.write_table(pa.table({"text": [f"row {i}" for i in range(200)]}), folder / "whole.parquet")
        content = (folder / "whole.parquet").read_bytes()
        (folder / "whole.parquet").unlink()
        (folder / "rows.parquet").write_bytes(change(content))
        return folder / "rows.parquet"

    return Kind(name, write, message, "pretrain", None)


def _columns_twice(folder: Path) -> Path:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def _no_rows(folder: Path) -> Path:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "rows.parquet")
    return folder / "rows.parquet"


def _not_utf8_cell(first: str, last: str) -> Any:
    cells = [first.encode(), b"caf\xe9", last.encode()]
    return pa.StringArray.from_buffers(3, *pa.array(cells, pa.binary()).buffers()[1:])


GOOD_LINE = json.dumps(GOOD["sft"][0]).encode()
SAYS = b'{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "x"}]}'
JSON_KINDS = [
    _line("no JSON", b"red cat", "row: not valid JSON (Expecting value at column 1); write one JSON object a line"),
    _line("JSON that is cut off", GOOD_LINE[:-9], "row: not valid JSON ("),
    _line("an open string", b'{"messages": "x', "row: not valid JSON (Unterminated string"),
    _line("two objects in a line", GOOD_LINE + b" " + GOOD_LINE, "row: not valid JSON: several objects on one line"),
    _line("lone carriage returns", GOOD_LINE + b"\r" + GOOD_LINE, "row: not valid JSON (Extra data"),
    _line("a trailing comma", b'{"messages": [],}', "row: not valid JSON: a comma at column 16 with nothing behind it"),
    _line("single quotes", b"{'messages': []}", "row: not valid JSON: single quotes at column 2, as Python prints"),
    _line("a comment", b"// rows", "row: not valid JSON ("),
    _line("leading zeros", b'{"messages": 01}', "row: not valid JSON ("),
    _line("a bad escape", SAYS % rb"\x41", "row: not valid JSON ("),
    _line("a bad code point", SAYS % rb"\u12G4", "row: not valid JSON ("),
    _line("a control character", SAYS % b"\x1b[2J", "row: not valid JSON (Invalid control character"),
    _line("a NUL in a text", SAYS % b"\0", "row: not valid JSON (Invalid control character"),
    _line("a list", b"[1, 2]", "row: a JSON list, not an object; write one JSON object a line"),
    _line("a text", b'"x"', "row: a JSON str, not an object"),
    _line("a number", b"3", "row: a JSON int, not an object"),
    _line("null", b"null", "row: a JSON NoneType, not an object"),
    _line("NaN", b'{"messages": NaN}', "row: NaN is not JSON"),
    _line("Infinity", b'{"messages": [Infinity]}', "row: Infinity is not JSON"),
    _line("minus Infinity", b'{"messages": {"a": -Infinity}}', "row: -Infinity is not JSON"),
    _line("a float too large", GOOD_LINE[:-1] + b', "score": 1e999}', "row: the number 1e999 is too large"),
    _line("a number too long", b'{"id": %s}' % (b"9" * 5000), "row: a whole number of more digits than can be read"),
    _line("lists a hundred thousand deep", b'{"a": %s' % (b"[" * 100_000), "row: JSON nested too deeply"),
    _line("objects as deep", b'{"a":' * 30_000, "row: JSON nested too deeply"),
    _line("a key twice", b'{"messages": [], ' + GOOD_LINE[1:], "row: the key 'messages' twice in one object"),
    _line("a role twice", GOOD_LINE.replace(b'"role"', b'"role": "system", "role"', 1), "row: the key 'role' twice"),
    _line("twice by an escape", GOOD_LINE[:-1] + rb', "\u006dessages": []}', "row: the key 'messages' twice"),
    _line("a line too long", SAYS % (b"x" * MAX_LINE_BYTES), "row: a line of more than 200,000 bytes"),
    _line("a line far too long", b"x" * (3 << 20), "row: a line of more than 200,000 bytes"),
]
ENCODING_KINDS = [
    _line("Latin-1", SAYS % b"caf\xe9", "row: not UTF-8 (byte 0xe9 at offset "),
    _line("random bytes", b"\x80\xff\xfe\x00\x93", "row: not UTF-8 (byte 0x80 at offset 0 of the line)"),
    _line("an overlong NUL", SAYS % b"\xc0\x80", "row: not UTF-8 (byte 0xc0"),
    _line("an encoded surrogate", SAYS % b"\xed\xa0\x80", "row: not UTF-8 (byte 0xed"),
    _line("beyond Unicode", SAYS % b"\xf4\x90\x80\x80", "row: not UTF-8 (byte 0xf4"),
    _line("half a character", SAYS % b"\xe4\xb8", "row: not UTF-8 (byte 0xe4"),
    _line("a high surrogate", SAYS % rb"\ud83d", "row: an unpaired surrogate escape"),
    _line("a low surrogate", SAYS % rb"\uDE42", "row: an unpaired surrogate escape"),
    _line("surrogates the wrong way round", SAYS % rb"\ude42\ud83d", "row: an unpaired surrogate escape"),
    _line("a surrogate in a key", GOOD_LINE[:-1] + rb', "\ud800": 1}', "row: an unpaired surrogate escape"),
    _line("a byte order mark inside", b"\xef\xbb\xbf" + GOOD_LINE, "row: not valid JSON (a byte order mark"),
    _line("UTF-16 with its mark", "\ufeffred cat".encode("utf-16-le"), "row: not UTF-8 but UTF-16, by its byte order"),
    _line("UTF-32 with its mark", "\ufeffred cat".encode("utf-32-be"), "row: not UTF-8 but UTF-32, by its byte order"),
    _line("UTF-16 without a mark", "{}".encode("utf-16-be"), "row: not valid JSON (Expecting value at column 1); t"),
    _line("NULs after a power cut", b"\0" * 4096, "row: not valid JSON (Expecting value at column 1); there are NUL"),
    Kind("UTF-16 throughout", _raw("a.jsonl", '{"a": 1}'.encode("utf-16")), "row: not UTF-8 but UTF-16", line=1),
]  # fmt: skip
FORMAT_KINDS = [
    _row("no known key", {"id": 1}, "row: unknown format, keys found: id; known: messages, "),
    _row("no key", {}, "row: unknown format, keys found: none"),
    _row("null for messages", {"messages": None}, "row: unknown format"),
    _row("two formats", {"messages": [USER, REPLY], "conversations": []}, "row: fits the formats messages and"),
    _row("a text for messages", {"messages": "red cat"}, "messages: text found; give a list of messages"),
    _row("an object for messages", {"messages": USER}, "messages: an object found; give a list of messages"),
    _messages("no message", "messages: an empty conversation, so nothing would be trained"),
    _messages("a number for a message", "messages[1]: a number found", USER, 3),
    _messages("a list for a message", "messages[0]: a list with a number found", [1]),
    _messages("lists in lists", "messages[0]: a list with a list found", json.loads("[" * 300 + "]" * 300)),
    _messages("no role", "messages[0].role: missing, keys found: content", {"content": "x"}, REPLY),
    _messages("ShareGPT's keys", "messages: no assistant turn", {"from": "human", "value": "x"}),
    _messages("an unknown role", "messages[1].role: unknown role 'owl'; give one of", USER, REPLY | {"role": "owl"}),
    _messages("a role with a space", "messages[0].role: unknown role 'user '", USER | {"role": "user "}, REPLY),
    _messages("a list for a role", "messages[0].role: unknown role [", USER | {"role": [["user"] * 99]}, REPLY),
    _messages("a number for a role", "messages[0].role: unknown role 10", USER | {"role": 10**4000}, REPLY),
    _messages("no content", "messages[0].content: missing; give text", {"role": "user"}, REPLY),
    _messages("null for content", "messages[1].content: missing; give text", USER, REPLY | {"content": None}),
    _messages("a number for content", "messages[1].content: a number found", USER, REPLY | {"content": 4.5}),
    _messages("true for content", "messages[0].content: true or false found", USER | {"content": True}, REPLY),
    _messages("parts for content", "messages[0].content[0]: no value", USER | {"content": [{"type": "text"}]}, REPLY),
    _messages("an object for content", "messages[0].content: an object found", USER | {"content": {}}, REPLY),
    _messages("nobody answers", "messages: no assistant turn, so nothing would be trained", USER, USER),
    _messages("thoughts that are no text", "messages[1].reasoning_content: a", USER, REPLY | {"reasoning_content": []}),
    _messages("calls that are no JSON", "messages[1].tool_calls: not valid JSON", USER, REPLY | {"tool_calls": "[{"}),
    _messages("a number for calls", "messages[1].tool_calls: a number found", USER, REPLY | {"tool_calls": 7}),
    _messages("texts for calls", "messages[1].tool_calls: a list with text", USER, REPLY | {"tool_calls": ["add"]}),
    _messages("an object for tools", "tools: an object found", USER, REPLY, tools={"name": "add"}),
    _messages("tools with NaN", "tools: NaN is not JSON", USER, REPLY, tools='[{"a": NaN}]'),
    _messages("tools with a key twice", "tools: the key 'a' twice", USER, REPLY, tools='[{"a": 1, "a": 2}]'),
    _messages("tools twice", "messages[0].tools: tools are given twice", USER | {"tools": [{}]}, REPLY, tools=[{}]),
    _messages("tools nested too deep", "conversation: the chat template cannot render it (",
              USER, REPLY, tools=[{"a": json.loads("[" * 800 + "]" * 800)}]),
    _row("conversations of text", {"conversations": ["x"]}, "conversations[0]: text found"),
    _row("conversations from human", {"conversations": [{"from": "human"}]}, "conversations[0].content: missing"),
    _row("a prompt alone", {"prompt": "x"}, "row: unknown format, keys found: prompt"),
    _row("null for a completion", {"prompt": "x", "completion": None}, "row: unknown format"),
    _row("a number for a prompt", {"prompt": 1, "completion": "x"}, "prompt: a number found"),
    _row("an object for a completion", {"prompt": "x", "completion": {}}, "completion: an object found"),
    _row("an empty list for a prompt", {"prompt": [], "completion": "x"}, "prompt: an empty conversation"),
    _row("a user completes", {"prompt": "x", "completion": [USER]}, "completion: no assistant turn"),
    _row("a key that steers the terminal", {"\x1b[2J\r\n/x.jsonl:9: ok": 1},
         "row: unknown format, keys found: \\x1b[2J\\x0d\\n/x.jsonl:9: ok; known"),
    _messages("a role that steers it", "messages[0].role: unknown role '\\x1b]0;x\\x07\\u202e'",
              USER | {"role": "\x1b]0;x\x07\u202e"}),
    _row("a key as long as a book", {"x" * 100_000: 1}, "row: unknown format, keys found: " + "x" * 60 + "...; known"),
    _row("a thousand keys", {str(i): i for i in range(1000)}, "row: unknown format, keys found: 0, 1, 10, 100, 101"),
]  # fmt: skip
TEXT_KINDS = [
    _row("no text", {"body": "x"}, "text: missing, keys found: body", "pretrain"),
    _row("null for a text", {"text": None}, "text: null; add it", "pretrain"),
    _row("an empty text", {"text": ""}, "text: empty text, so nothing would be trained", "pretrain"),
    _row("a number for a text", {"text": 3}, "text: a number found; give text", "pretrain"),
    _row("a list for a text", {"text": ["x"]}, "text: a list with text found; give text", "pretrain"),
    _row("an object for a text", {"text": {"a": 1}}, "text: an object found; give text", "pretrain"),
    _parquet("a cell that is not UTF-8", "row: not UTF-8 (byte 0xe9 at offset 3 of a text)", _not_utf8_cell),
    _parquet("a cell without text", "text: null; add it", None),
    _parquet("an empty cell", "text: empty text", ""),
    _parquet("a cell of no messages", "messages: an empty conversation", [], "sft"),
    _parquet("a cell with no role", "messages[0].role: missing, keys found: content",
             [{"role": None, "content": "x"}], "sft"),
]  # fmt: skip
FILE_KINDS = [
    Kind("a .txt in UTF-16", _raw("a.txt", "red cat".encode("utf-16")), "text: not UTF-8 but UTF-16", "pretrain", 1),
    Kind("a .txt in UTF-16 without a mark", _raw("a.txt", "red".encode("utf-16-le")),
         "text: a NUL byte at offset 1 of the file", "pretrain", 1),
    Kind("a .txt in Latin-1", _raw("a.txt", b"caf\xe9"), "text: not UTF-8 (byte 0xe9 at offset 3", "pretrain", 1),
    Kind("a program called .txt", _raw("a.txt", b"\x7fELF\2\1\1\0\0\0"), "text: a NUL byte at offset 7", "pretrain", 1),
    Kind("an empty .txt", _raw("a.txt", b""), "empty; remove it from data.path", "pretrain", None),
    Kind("a mark and no text", _raw("a.txt", b"\xef\xbb\xbf"), "empty; remove it", "pretrain", None),
    Kind("an empty .jsonl", _raw("a.jsonl", b""), "empty; remove it", "sft", None),
    Kind("blank lines alone", _raw("a.jsonl", b"\n \r\n\t\n"), "empty; remove it", "sft", None),
    Kind("an empty .parquet", _raw("a.parquet", b""), "empty; remove it", "pretrain", None),
    Kind("a .docx", _raw("a.docx", b"PK\x03\x04"), "a Word document; convert it to text first", "pretrain", None),
    Kind("a program", _raw("a", b"\x7fELF\x02\0"), "a program; there is no text in it", "pretrain", None),
    Kind("a .parquet that is none", _raw("a.parquet", b"PAR1 x"), "not a readable Parquet file (", "pretrain", None),
    Kind("a .parquet that is JSON", _raw("a.parquet", b"hello"), "not a readable Parquet file (", "pretrain", None),
    Kind("a .parquet with columns twice", _columns_twice, "columns named twice: text", "pretrain", None),
    Kind("a .parquet without rows", _no_rows, "empty; remove it", "pretrain", None),
    _table("a .parquet without its end", "not a readable Parquet file (", lambda whole: whole[:-20]),
    _table("a .parquet without its start", "", lambda whole: whole[300:]),
    _table("a .parquet with a wrong footer", "not a readable Parquet file (",
           lambda whole: whole[:-8] + b"\xff\xff\xff\x7fPAR1"),
    _table("a .parquet with its pages gone", "", lambda whole: b"PAR1" + b"\xff" * 200 + whole[204:]),
]  # fmt: skip
KINDS = [*JSON_KINDS, *ENCODING_KINDS, *FORMAT_KINDS, *TEXT_KINDS, *FILE_KINDS]


def _samples(store: Store) -> list[tuple[list[int], list[bool]]]:
    return [(store[i].tokens.tolist(), store[i].loss_mask.tolist()) for i in range(len(store))]


class Bench:
    """Prepares rows by the command line."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world = world
        self.store = folder / "store"
        self._folder = folder

    def prepare(self, stage: str, path: Path, *overrides: str) -> tuple[int, str, str, Recipe]:
        recipe = self._world.write_recipe(
            self._folder / "run", stage=stage, data__path=str(path), data__eval_path=[], data__store=str(self.store)
        )
        return *pertoken("prepare", recipe, *overrides), Recipe.load(recipe, overrides)

    def opened(self, recipe: Recipe) -> Store:
        """The store that a command has built."""
        tokenizer = _tokenizer(recipe.data.tokenizer)
        store = build_store(recipe.data.path, stage=recipe.stage, tokenizer=tokenizer, data=recipe.data)
        assert store.report.hit
        return store


_tokenizer = cache(load_tokenizer)


@pytest.fixture
def bench(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", MAX_LINE_BYTES)
    return Bench(world, tmp_path)


@pytest.fixture(scope="module")
def good_samples(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the good rows alone give."""
    folder = tmp_path_factory.mktemp("good")
    samples = {}
    for stage, rows in GOOD.items():
        bench = Bench(world, folder)
        *_, recipe = bench.prepare(stage, _write(folder / "good.jsonl", [json.dumps(row).encode() for row in rows]))
        samples[stage] = _samples(bench.opened(recipe))
    return samples


def test_the_kinds_are_at_least_sixty_and_all_different() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 60


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bad_input_is_named_by_file_and_line_and_passed_over_alone(
    kind: Kind, bench: Bench, good_samples: dict[str, Any], tmp_path: Path
) -> None:
    path = kind.write(tmp_path)
    where = f"{path}:{kind.line}: " if kind.line else f"{path}: "
    code, _, err, _ = bench.prepare(kind.stage, path)
    assert code == 2, err
    lines = err.removeprefix("error: ").splitlines()
    assert lines[0].startswith(where + kind.message), err
    assert all(len(line) < 500 and line.isprintable() for line in lines), err
    assert not list(bench.store.glob("*")), "nothing was kept to be trained on"

    code, _, err, recipe = bench.prepare(kind.stage, path, "data.on_bad_row=skip")
    if kind.line != 2:
        assert code == 2, "nothing is left of the file"
        return
    assert code == 0, err
    store = bench.opened(recipe)
    assert store.report.skipped_file is not None
    assert Path(store.report.skipped_file).read_text().splitlines() == lines[:1]
    assert (store.report.rows, store.report.skipped, store.lines.tolist()) == (3, 1, [1, 3])
    assert _samples(store) == good_samples[kind.stage]


def _write(path: Path, lines: Iterable[bytes]) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_all_kinds_in_one_file_leave_every_good_row_around_them(bench: Bench, tmp_path: Path) -> None:
    bad = [kind.write(tmp_path).read_bytes().split(b"\n")[1] for kind in [*JSON_KINDS, *ENCODING_KINDS[:-1]]]
    good = [json.dumps({"messages": [USER, REPLY | {"content": f"{i} cats"}]}).encode() for i in range(len(bad) + 1)]
    mixed = _write(
        tmp_path / "mixed.jsonl", [good[0], *(line for pair in zip(bad, good[1:], strict=True) for line in pair)]
    )
    code, _, err, recipe = bench.prepare("sft", mixed, "data.on_bad_row=skip")
    assert code == 0, err
    store = bench.opened(recipe)
    assert store.lines.tolist() == list(range(1, 2 * len(good), 2))
    listed = Path(str(store.report.skipped_file)).read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{mixed}:{n}" for n in range(2, 2 * len(good), 2)]
    *_, recipe = bench.prepare("sft", _write(tmp_path / "good.jsonl", good))
    assert _samples(store) == _samples(bench.opened(recipe))


@pytest.mark.parametrize("name", ["Latin-1", "a .parquet that is none"])
def test_a_run_in_a_process_of_its_own_ends_with_exit_2_and_trains_nothing(
    name: str, world: World, tmp_path: Path
) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    path, out = kind.write(tmp_path), tmp_path / "run"
    recipe = world.write_recipe(
        out, stage=kind.stage, data__path=str(path), data__eval_path=[], data__store=str(tmp_path / "store")
    )
    ended = subprocess.run(
        [sys.executable, "-m", "pertoken", "train", recipe], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2, ended
    assert ended.stderr.startswith(f"error: {path}:2: " if kind.line else f"error: {path}: ")
    assert "Traceback" not in ended.stderr
    assert not out.exists()
