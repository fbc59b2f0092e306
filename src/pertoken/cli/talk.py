"""The commands that talk with a model. Everything heavy is imported inside of them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from pertoken.cli.shared import from_hub

__all__ = ["Device", "ModelPath", "talk_app"]

talk_app = typer.Typer(rich_markup_mode=None)
ModelPath = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A run, a checkpoint, a Hugging Face folder or owner/name, a .gguf, a .pth"),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")]
Sampling = {
    "max_new_tokens": typer.Option(help="At most this many tokens"),
    "temperature": typer.Option(help="0: always the likeliest token"),
    "top_k": typer.Option(help="Only the k likeliest tokens; 0: all"),
    "top_p": typer.Option(help="Only the likeliest tokens that make up this probability"),
    "repetition_penalty": typer.Option(help="Above 1: tokens already there become less likely"),
    "seed": typer.Option(help="Left out: another one each time"),
}


@talk_app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Option(help="Text to continue from")],
    chat: Annotated[bool, typer.Option("--chat", help="Give the prompt as a user's message, by the template")] = False,
    max_new_tokens: Annotated[int, Sampling["max_new_tokens"]] = 256,
    temperature: Annotated[float, Sampling["temperature"]] = 0.0,
    top_k: Annotated[int, Sampling["top_k"]] = 0,
    top_p: Annotated[float, Sampling["top_p"]] = 1.0,
    repetition_penalty: Annotated[float, Sampling["repetition_penalty"]] = 1.0,
    seed: Annotated[int | None, Sampling["seed"]] = None,
    device: Device = "auto",
) -> None:
    """Complete a prompt; stops at the end of the turn or document."""
    from pertoken.inference.chat import ChatSession

    talker = ChatSession.load(from_hub(model), device)
    ids = talker.encode_chat([{"role": "user", "content": prompt}]) if chat else talker.encode(prompt)
    _stream(
        talker.reply(
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
    )


@talk_app.command()
def chat(
    model: ModelPath,
    system: Annotated[str | None, typer.Option(help="A system message to begin with")] = None,
    max_new_tokens: Annotated[int, Sampling["max_new_tokens"]] = 512,
    temperature: Annotated[float, Sampling["temperature"]] = 0.7,
    top_k: Annotated[int, Sampling["top_k"]] = 0,
    top_p: Annotated[float, Sampling["top_p"]] = 0.9,
    repetition_penalty: Annotated[float, Sampling["repetition_penalty"]] = 1.0,
    seed: Annotated[int | None, Sampling["seed"]] = None,
    device: Device = "auto",
) -> None:
    """Talk to a model. /new starts over, /exit or end of input leaves."""
    from pertoken.errors import PertokenError
    from pertoken.inference.chat import ChatSession
    from pertoken.inference.generate import check_sampling

    talker = ChatSession.load(from_hub(model), device)
    talker.require_template()
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    opening = [{"role": "system", "content": system}] if system else []
    check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    turns: list[dict[str, str]] = []
    for said in _lines_from_user():
        if said == "/new":
            turns = []
            continue
        turns.append({"role": "user", "content": said})
        try:
            ids, dropped = talker.encode_latest(opening, turns, room=max_new_tokens)
            if dropped:
                turns = turns[dropped:]
                _say(f"the conversation is longer than the model's context; its oldest {dropped} messages are dropped")
            answer = _stream(talker.reply(ids, **sampling))
        except PertokenError as error:  # about this message; the conversation stays as it was before it
            _say(f"not answered: {error}")
            turns.pop()
            continue
        except KeyboardInterrupt:  # stops the answer, not the chat
            print()
            turns.pop()
            continue
        turns.append({"role": "assistant", "content": answer})


def _lines_from_user() -> Iterator[str]:
    """What is typed, line by line without blank ones, up to /exit or the end. A line that is not UTF-8 is refused."""
    if sys.stdin is None:  # closed by whoever started this
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    interactive = sys.stdin.isatty()
    while True:
        try:
            said = input("you> " if interactive else "").strip()
            said.encode()
        except UnicodeEncodeError:
            _say("not UTF-8; this line was not sent")
            continue
        except (EOFError, KeyboardInterrupt):
            return
        if said == "/exit":
            return
        if said:
            yield said


def _say(text: str) -> None:
    from pertoken.text import plain

    print(plain(text), file=sys.stderr, flush=True)


def _stream(pieces: Any) -> str:
    from pertoken.text import plain

    text = ""
    for piece in pieces:
        text += piece
        print(plain(piece), end="", flush=True)
    print()
    return text
