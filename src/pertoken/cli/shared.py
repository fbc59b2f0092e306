"""What commands share: types of arguments, the console, results as JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pertoken.cli.output import Output
from pertoken.errors import RecipeError
from pertoken.text import plain

if TYPE_CHECKING:
    from rich.console import Console

    from pertoken.console import ConsoleListener
    from pertoken.data.store.dataset import Dataset

__all__ = [
    "DataPath",
    "JsonFile",
    "Overrides",
    "VerifyData",
    "drop_what_cannot_be_shown",
    "from_hub",
    "listener_on",
    "open_console",
    "say",
    "say_what_is_in",
    "write_json",
    "write_text",
]

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to override: train.learning_rate=3e-4")
]
VerifyData = Annotated[
    bool, typer.Option("--verify-data", help="Read all data again, and check every byte of the token store")
]
DataPath = Annotated[
    str, typer.Argument(metavar="DATA", help="A file, a folder or a glob of data, or hf://datasets/owner/name")
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there as JSON too")]


def open_console(*, result: bool = True) -> Console:
    """Of a command whose `result` is what it shows. Else what cannot be shown is dropped, and the command continues."""
    from rich.console import Console

    if not result:
        drop_what_cannot_be_shown()
    if sys.stdout.isatty():
        return Console()
    return Console(soft_wrap=True, width=160)  # lines of a file are as long as they are


def drop_what_cannot_be_shown() -> None:
    """The command's result is not what it shows."""
    if isinstance(sys.stdout, Output):
        sys.stdout.drop_failures()


def listener_on(console: Console, *, log_interval: int) -> ConsoleListener:
    """Who shows there, in the command line's words, what happens."""
    from pertoken.cli.words import as_flags
    from pertoken.console import ConsoleListener

    return ConsoleListener(console, log_interval=log_interval, words=as_flags)


def from_hub(text: str, part: Literal["model", "data"] = "model") -> str:
    """MODEL or DATA as a path. What the hub has by that name is downloaded, which is shown on stderr: stdout is for
    what the command answers."""
    from pertoken.hub.fetch import name_of, on_disk

    if name_of(text, part, part) is None:
        return text
    from rich.console import Console

    listener = listener_on(Console(stderr=True), log_interval=1)
    try:
        return on_disk(text, part, label=part, on_message=listener.message, on_progress=listener.downloading)
    finally:
        listener.close()


def say(console: Console, text: str) -> None:
    """A line with names from users or data in it: neither markup nor control characters do anything."""
    from rich.text import Text

    console.print(Text(plain(text)))


def say_what_is_in(console: Console, name: str, store: Dataset) -> None:
    supervised, tokens = store.count(), int(store.lengths.sum())
    say(console, f"{name}: {len(store):,} samples, {supervised:,} of {tokens:,} tokens supervised")
    for note in store.notes():
        say(console, f"  {note}")


def write_json(path: Path | None, text: str) -> None:
    write_text(path, text + "\n", "json")


def write_text(path: Path | None, text: str, argument: str) -> None:
    """To the file that `argument` names, if it names one. Raises RecipeError."""
    if path is None:
        return
    from pertoken.files import user_path

    try:
        user_path(path, argument).write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{argument}={path}: cannot be written ({error.strerror})") from None
