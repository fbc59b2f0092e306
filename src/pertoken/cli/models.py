"""The commands that make files for others: exported models, tokenizers. Everything heavy is imported inside of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pertoken.cli.shared import drop_what_cannot_be_shown, from_hub
from pertoken.text import plain

__all__ = ["models_app", "tokenizer_app"]

models_app = typer.Typer(rich_markup_mode=None)
tokenizer_app = typer.Typer(help="Make tokenizers.", no_args_is_help=True, rich_markup_mode=None)


@models_app.command()
def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run, a checkpoint, any model folder or owner/name, a .gguf")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write (hf), or the folder or .pth file (minimind)")],
    format_: Annotated[str, typer.Option("--format", metavar="hf|minimind")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; left out: as trained (hf), float16 (minimind)")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Put a run's adapter into the weights of its base")] = False,
) -> None:
    """Write a model for others: a Hugging Face folder, peft's folder of an adapter, or MiniMind's .pth."""
    from pertoken.checkpoints.export import export_model

    drop_what_cannot_be_shown()
    for path in export_model(from_hub(run), out, format_=format_, dtype=dtype, merge=merge):
        print(plain(str(path)))


@tokenizer_app.command(name="train")
def tokenizer_train(
    files: Annotated[list[str], typer.Argument(metavar="FILES...", help="Text or chats in files of any kind")],
    out: Annotated[Path, typer.Option(help="The folder to write")],
    vocab_size: Annotated[int | None, typer.Option(help="Tokens in all; needed for bpe")] = None,
    kind: Annotated[Literal["bpe", "char"], typer.Option(help="Byte-level BPE, or one token per character")] = "bpe",
    text_key: Annotated[str, typer.Option(help="The key of a row's text")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a tokenizer in that folder")] = False,
) -> None:
    """Train a tokenizer with a chat template on text or conversations."""
    from pertoken.data.tokens.train import train_tokenizer

    drop_what_cannot_be_shown()
    tokenizer = train_tokenizer(
        files,
        vocab_size=vocab_size,
        kind=kind,
        out_dir=out,
        text_key=text_key,
        overwrite=overwrite,
        on_message=lambda text: print(plain(text)),
    )
    print(plain(f"{out}: {len(tokenizer):,} tokens"))
