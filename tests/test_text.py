"""What users and data say is shown, never obeyed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pertoken.console import ConsoleListener, show_token_losses
from pertoken.inference.token_losses import TokenLoss
from pertoken.text import names, one_line, plain, reason, shown

HOSTILE = "a\x1b]0;title\x07\x9b2J\r\x08\x7f\u202e\u2066\ud800[red]x[/] :smile: [/nonsense]"


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain text, 中文　有空格, naïve, 👩\u200d🚀", None),
        ("two\n\tlines", None),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x07\x00\x7f\x9b\r\x08", "\\x07\\x00\\x7f\\x9b\\x0d\\x08"),
        ("\u202e\u2066\u200f\ufeff", "\\u202e\\u2066\\u200f\\ufeff"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("\u2028", "\\u2028"),
    ],
)
def test_text_that_steers_a_terminal_is_shown_as_escapes_and_other_text_as_it_is(text: str, safe: str | None) -> None:
    assert plain(text) == (text if safe is None else safe)


def test_every_single_character_is_safe_in_one_line() -> None:
    for code in range(0x110000):
        line = one_line(chr(code))
        assert line.isprintable() or line in "\u3000\u00a0\u200c\u200d", hex(code)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, 10**5000, [[[["x"] * 99] * 99] * 99], {HOSTILE: {1: "\n"}}, b"\xff", None],
    ids=["long", "huge", "nested", "hostile", "bytes", "none"],
)
def test_a_value_is_shown_in_one_short_line(value: object) -> None:
    assert shown(value).isprintable()
    assert len(shown(value)) < 400


def test_a_reason_is_one_short_line() -> None:
    assert reason(ValueError("a\n b\x1b" + "c" * 10**6)) == "a b\\x1b" + "c" * 296
    assert reason(KeyError()) == "KeyError"


def test_names_are_few_and_short() -> None:
    assert names([]) == "none"
    assert names(["b", "a\n"]) == "a\\n, b"
    assert names(map(str, range(100))).endswith("13, 14, 15 and 92 more")
    assert names(["x" * 1000]) == "x" * 60 + "..."


def test_neither_markup_nor_control_characters_of_data_do_anything_in_the_console() -> None:
    out = io.StringIO()
    console = Console(file=out, width=300, force_terminal=False, soft_wrap=True)
    listener = ConsoleListener(console, log_interval=1)
    listener.message(HOSTILE)
    show_token_losses(console, [TokenLoss(0, HOSTILE, HOSTILE, 1, True, 1.0, 0.5)], HOSTILE)
    printed = out.getvalue()
    assert printed.count("[red]x[/] :smile: [/nonsense]") == 4
    assert not set(printed) & set("\x1b\x07\x9b\r\x08\x7f\u202e\u2066\ud800")
