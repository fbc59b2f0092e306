"""The commands around training: a starter recipe, its data, the run. Everything heavy is imported inside of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pertoken.cli.shared import Overrides, VerifyData, listener_on, open_console, say, say_what_is_in
from pertoken.errors import PertokenError, RecipeError

__all__ = ["training_app"]

training_app = typer.Typer(rich_markup_mode=None)


@training_app.command()
def new(stage: Annotated[str, typer.Argument(metavar="sft|pretrain")]) -> None:
    """Print a commented starter recipe."""
    from pertoken.recipe.starter import STARTERS

    if stage not in STARTERS:
        raise RecipeError(f"{stage}: no such recipe; there are {', '.join(STARTERS)}")
    print(STARTERS[stage], end="")


@training_app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; `pertoken new sft` prints one")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest valid checkpoint")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in out_dir")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --resume: go on although data, weights or code give another loss")
    ] = False,
    verify_data: VerifyData = False,
) -> None:
    """Train a model as a recipe says."""
    from pertoken.runs.signals import stop_on_signals

    with stop_on_signals():  # from here on, though torch is still to be imported
        _train(recipe, overrides or (), resume=resume, overwrite=overwrite, force=force, verify_data=verify_data)


def _train(
    recipe: Path, overrides: Sequence[str], *, resume: bool, overwrite: bool, force: bool, verify_data: bool
) -> None:
    from pertoken.recipe.schema import Recipe

    parsed = Recipe.load(recipe, overrides)

    from pertoken.runs.setup import train as run_training

    console = open_console(result=False)
    listener = listener_on(console, log_interval=parsed.log.log_interval)
    try:
        result = run_training(
            parsed, resume=resume, overwrite=overwrite, force=force, verify_data=verify_data, listener=listener
        )
    except PertokenError:
        raise
    except Exception as error:
        from pertoken.cli.bug_report import Unforeseen

        raise Unforeseen(error, Path(parsed.out_dir)) from error
    finally:
        listener.close()
    if os.environ.get("RANK", "0") == "0":
        say(console, f"done: {result.checkpoint}")


@training_app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE")],
    overrides: Overrides = None,
    verify_data: VerifyData = False,
) -> None:
    """Tokenize a recipe's data into its store, or say that it is there."""
    from pertoken.recipe.schema import Recipe

    parsed = Recipe.load(recipe, overrides or ())

    from pertoken.runs.data import prepare as run_preparing

    console = open_console(result=False)
    listener = listener_on(console, log_interval=1)
    stores = run_preparing(parsed, listener, verify_data=verify_data)
    for name, store in zip(("training", "evaluation"), stores, strict=True):
        if store is not None:
            say_what_is_in(console, name, store)


@training_app.command()
def demo(
    out: Annotated[Path, typer.Option(help="A new folder for all that is made")] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="About how long it may take in all")] = 4.4,
) -> None:
    """Tokenizer, pretraining, fine-tuning on real chats, evaluation and a chat, on a laptop CPU."""
    from pertoken.demo.demo import run_demo
    from pertoken.files import user_path

    run_demo(open_console(result=False), user_path(out, "--out"), minutes)
