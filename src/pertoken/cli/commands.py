"""The commands. Everything heavy is imported inside of the command that needs it, so that --help answers at once."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pertoken.cli.output import Output, own_streams
from pertoken.cli.talk import Device, ModelPath, talk_app
from pertoken.errors import CheckFailed, PertokenError, RecipeError
from pertoken.text import plain

if TYPE_CHECKING:
    from rich.console import Console

    from pertoken.data.store.store import Store

__all__ = ["app", "command", "main"]

app = typer.Typer(
    name="pertoken",
    help="Pretrain and fine-tune language models: every supervised token counts once, however the work is split.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tokenizer_app = typer.Typer(help="Make tokenizers.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(talk_app)

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to override: train.learning_rate=3e-4")
]
VerifyData = Annotated[
    bool, typer.Option("--verify-data", help="Read all data again, and check every byte of the token store")
]

DataPath = Annotated[str, typer.Argument(metavar="DATA", help="A file, a folder or a glob of data")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there as JSON too")]


def command() -> None:
    """`main` as a process of its own, which ends at once where nothing waits for its end.

    Python takes a third of a second to take apart what torch has loaded. Left to it are threads that are still at work,
    and libraries that have more to do: the compiler's workers, a tracker's connection.
    """
    try:
        main()
    except SystemExit as end:
        others = {"torch._inductor", "wandb"} & sys.modules.keys()
        if others or any(not thread.daemon for thread in threading.enumerate()[1:]) or not isinstance(end.code, int):
            raise
        for stream in (sys.stdout, sys.stderr):  # None where it was closed from the start
            if stream is not None:
                stream.flush()  # nothing of the command's own is left to write: `_run` has seen to it
        os._exit(end.code)


def main() -> None:
    """Run the command line; a user's error becomes one message on stderr and its exit code."""
    if _is_a_rank():
        from pertoken.training.parallel import end_process

        end_process(_run())
    sys.exit(_run())


def _run() -> int:
    """The exit code of the command that was asked for. The first rank that fails says why, on stderr."""
    with own_streams() as out:
        try:
            code = _asked_for()
            if code == 0:
                out.flush()  # raises OutputLost where the last of it does not get through
            return code
        except PertokenError as error:
            if str(error) and _speaks():
                print(plain("\n".join((f"error: {error}", *getattr(error, "__notes__", ())))), file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            if not _speaks():
                return 1  # in the wake of another rank, which has said why
            from pertoken.cli.bug_report import say_unforeseen

            return say_unforeseen(error, sys.argv[1:])


def _asked_for() -> int:
    """The command's own exit code, or that of a command line which is none."""
    try:
        app(prog_name="pertoken")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _is_a_rank() -> bool:
    """Whether torchrun has started this process with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _speaks() -> bool:
    """Whether no other rank has failed, and said why, before this process."""
    if not _is_a_rank():
        return True
    from pertoken.training.parallel import first_to_fail

    return first_to_fail()


def _console(*, result: bool = True) -> Console:
    """Of a command whose `result` is what it shows. Else what cannot be shown is dropped, and the command continues."""
    from rich.console import Console

    if not result:
        _drop_what_cannot_be_shown()
    if sys.stdout.isatty():
        return Console()
    return Console(soft_wrap=True, width=160)  # lines of a file are as long as they are


def _drop_what_cannot_be_shown() -> None:
    """The command's result is not what it shows."""
    if isinstance(sys.stdout, Output):
        sys.stdout.drop_failures()


@app.command()
def new(stage: Annotated[str, typer.Argument(metavar="sft|pretrain")]) -> None:
    """Print a commented starter recipe."""
    from pertoken.recipe.starter import STARTERS

    if stage not in STARTERS:
        raise RecipeError(f"{stage}: no such recipe; there are {', '.join(STARTERS)}")
    print(STARTERS[stage], end="")


@app.command()
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

    from pertoken.console import ConsoleListener
    from pertoken.runs.setup import train as run_training

    console = _console(result=False)
    listener = ConsoleListener(console, log_interval=parsed.log.log_interval)
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
        _say(console, f"done: {result.checkpoint}")


@app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE")],
    overrides: Overrides = None,
    verify_data: VerifyData = False,
) -> None:
    """Tokenize a recipe's data into its store, or say that it is there."""
    from pertoken.recipe.schema import Recipe

    parsed = Recipe.load(recipe, overrides or ())

    from pertoken.console import ConsoleListener
    from pertoken.runs.data import prepare as run_preparing

    console = _console(result=False)
    listener = ConsoleListener(console, log_interval=1)
    stores = run_preparing(parsed, listener, verify_data=verify_data)
    for name, store in zip(("training", "evaluation"), stores, strict=True):
        if store is not None:
            _say_what_is_in(console, name, store)


def _say(console: Console, text: str) -> None:
    """A line with names from users or data in it: neither markup nor control characters do anything."""
    from rich.text import Text

    console.print(Text(plain(text)))


def _say_what_is_in(console: Console, name: str, store: Store) -> None:
    supervised, tokens = int(store.num_tokens.sum()), int(store.lengths.sum())
    _say(console, f"{name}: {len(store):,} samples, {supervised:,} of {tokens:,} tokens supervised")
    for note in store.report.notes():
        _say(console, f"  {note}")


@app.command(name="prove")
def prove_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE")],
    overrides: Overrides = None,
    tokens: Annotated[int, typer.Option(help="About how many tokens of the first step's samples to use")] = 600,
    only: Annotated[list[str] | None, typer.Option(metavar="CLASS", help="This class alone; may be repeated")] = None,
    json_file: JsonFile = None,
) -> None:
    """Prove that no split changes the gradient, on this recipe's model and data; exit 1 if one does."""
    from pertoken.recipe.schema import Recipe

    parsed = Recipe.load(recipe, overrides or ())

    from pertoken.console import ConsoleListener, show_proof, show_proof_header, show_result
    from pertoken.prove.run import NAMES, prove

    console = _console()
    listener = ConsoleListener(console, log_interval=1)
    show_proof_header(console)
    proof = prove(
        parsed,
        tokens=tokens,
        only=only or NAMES,
        on_result=lambda result: show_result(console, result),
        listener=listener,
    )
    show_proof(console, proof)
    _write_json(json_file, proof.to_json())
    if not proof.holds:
        raise CheckFailed("the promise does not hold: see the classes that failed")


def _write_json(path: Path | None, text: str) -> None:
    if path is None:
        return
    from pertoken.files import user_path

    try:
        user_path(path, "--json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--json {path}: cannot be written ({error.strerror})") from None


@app.command(name="eval")
def evaluate_command(
    model: ModelPath,
    data: DataPath,
    overrides: Overrides = None,
    json_file: JsonFile = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64")] = "float32",
    device: Device = "auto",
) -> None:
    """Token-weighted loss, perplexity and bits per byte of a model on data."""
    from pertoken.engines.choose import choose_engine
    from pertoken.training.evaluate import evaluate, model_and_data
    from pertoken.training.precision import Precision, resolve_device

    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise RecipeError(f"--dtype {dtype}: must be float32, bfloat16, float16 or float64")
    console = _console()
    precision = Precision(dtype, resolve_device(device))
    loaded, store, _ = model_and_data(model, data, overrides or (), dtype=precision.parameter_dtype)
    _say_what_is_in(console, data, store)
    loaded = loaded.to(precision.device)
    # What this would remark is not of interest here.
    choice = choose_engine(loaded, "auto", dtype=dtype, device=precision.device, total_steps=0)
    result = evaluate(loaded, store, precision, token_budget=8192, execution=choice.execution)
    figures = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "loss_sum": result.loss_sum,
        "num_tokens": result.num_tokens,
        "num_bytes": result.num_bytes,
        "samples": len(store),
    }
    for name in ("loss", "perplexity", "bits_per_byte"):
        console.print(f"{name:<14} {figures[name]:.4f}", highlight=False)
    _write_json(json_file, json.dumps(figures, indent=1))


@app.command()
def inspect(
    model: ModelPath,
    data: DataPath,
    overrides: Overrides = None,
    row: Annotated[int | None, typer.Option(help="Line of the file, from 1; left out: the first that trains")] = None,
) -> None:
    """Show a row token by token: label, supervised or not, and the model's loss."""
    import numpy as np

    from pertoken.console import show_token_losses
    from pertoken.errors import DataError
    from pertoken.inference.token_losses import token_losses
    from pertoken.training.evaluate import model_and_data

    loaded, store, tokenizer = model_and_data(model, data, overrides or ())
    made = np.flatnonzero(store.lines == (store.lines[0] if row is None else row))
    if not len(made):
        lines = f"{store.lines.min()} to {store.lines.max()}"
        raise DataError(f"{data}: row {row} made no sample; those that did are between {lines}")
    console = _console()
    show_token_losses(console, token_losses(loaded, store[made[0]], tokenizer), store.where(made[0]))
    if len(made) > 1:
        console.print(f"the first of {len(made):,} samples of this row", highlight=False)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The out_dir of a run")],
    step: Annotated[int, typer.Option(help="A step of metrics.jsonl, or the one after its last")],
    worst: Annotated[int, typer.Option(help="For so many of its samples, show the loss of every token")] = 3,
    json_file: JsonFile = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto: as the run, if it is there")] = "auto",
) -> None:
    """Compute a recorded step again, compare it, and show its samples, worst first; exit 1 if it is another."""
    from dataclasses import asdict

    from pertoken.console import ConsoleListener, show_replay, show_token_losses
    from pertoken.inference.token_losses import token_losses
    from pertoken.runs.replay import for_json
    from pertoken.runs.replay import replay as run_again

    if worst < 0:
        raise RecipeError(f"--worst {worst}: must be at least 0")
    console = _console()
    again = run_again(run, step, device=device, listener=ConsoleListener(console, log_interval=10))
    show_replay(console, again)
    result = again.to_dict()
    for sample, entry in zip(again.samples[:worst], result["samples"], strict=False):
        with again.run.state.precision.autocast():
            losses = token_losses(again.run.model, again.run.train_store[sample.sample_id], again.run.tokenizer)
        show_token_losses(console, losses, sample.where)
        entry["losses"] = [asdict(loss) for loss in losses]
    _write_json(json_file, json.dumps(for_json(result), indent=1))
    again.raise_if_different()


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, a checkpoint or any model folder")],
    out: Annotated[Path, typer.Option(help="The folder to write (hf), or the folder or .pth file (minimind)")],
    format_: Annotated[str, typer.Option("--format", metavar="hf|minimind")] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; left out: as trained (hf), float16 (minimind)")
    ] = None,
) -> None:
    """Write a model for others: a Hugging Face folder, or MiniMind's .pth."""
    from pertoken.checkpoints.export import export_model

    _drop_what_cannot_be_shown()
    for path in export_model(run, out, format_=format_, dtype=dtype):
        print(plain(str(path)))


@tokenizer_app.command(name="train")
def tokenizer_train(
    files: Annotated[list[str], typer.Argument(metavar="FILES...", help=".txt, .jsonl or .parquet; text or chats")],
    out: Annotated[Path, typer.Option(help="The folder to write")],
    vocab_size: Annotated[int | None, typer.Option(help="Tokens in all; needed for bpe")] = None,
    kind: Annotated[Literal["bpe", "char"], typer.Option(help="Byte-level BPE, or one token per character")] = "bpe",
    text_key: Annotated[str, typer.Option(help="The key of a row's text")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a tokenizer in that folder")] = False,
) -> None:
    """Train a tokenizer with a chat template on text or conversations."""
    from pertoken.data.tokens.tokenizer import train_tokenizer

    _drop_what_cannot_be_shown()
    tokenizer = train_tokenizer(
        files, vocab_size=vocab_size, kind=kind, out_dir=out, text_key=text_key, overwrite=overwrite
    )
    print(plain(f"{out}: {len(tokenizer):,} tokens"))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="A new folder for all that is made")] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="About how long it may take in all")] = 4.4,
) -> None:
    """Tokenizer, pretraining, fine-tuning on real chats, evaluation and a chat, on a laptop CPU."""
    from pertoken.demo.demo import run_demo
    from pertoken.files import user_path

    run_demo(_console(result=False), user_path(out, "--out"), minutes)
