"""The commands that compute something anew and compare. Everything heavy is imported inside of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pertoken.cli.shared import (
    DataPath,
    JsonFile,
    Overrides,
    from_hub,
    listener_on,
    open_console,
    say,
    say_what_is_in,
    write_json,
)
from pertoken.cli.talk import Device, ModelPath
from pertoken.errors import CheckFailed, RecipeError

__all__ = ["checking_app"]

checking_app = typer.Typer(rich_markup_mode=None)


@checking_app.command(name="prove")
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

    from pertoken.console import show_proof, show_proof_header, show_result
    from pertoken.prove.run import NAMES, prove

    console = open_console()
    listener = listener_on(console, log_interval=1)
    for remark in parsed.remarks:
        listener.message(remark)
    show_proof_header(console)
    proof = prove(
        parsed,
        tokens=tokens,
        only=only or NAMES,
        on_result=lambda result: show_result(console, result),
        listener=listener,
    )
    show_proof(console, proof)
    write_json(json_file, proof.to_json())
    if not proof.holds:
        raise CheckFailed("the promise does not hold: see the classes that failed")


@checking_app.command(name="eval")
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
    from pertoken.inference.model_and_data import model_and_data
    from pertoken.training.evaluate import evaluate
    from pertoken.training.precision import Precision, resolve_device

    if dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise RecipeError(f"dtype={dtype}: must be float32, bfloat16, float16 or float64")
    console = open_console()
    precision = Precision(dtype, resolve_device(device))
    where, tell = (from_hub(model), from_hub(data, "data")), partial(say, console)
    loaded, store, _ = model_and_data(*where, overrides or (), dtype=precision.parameter_dtype, on_message=tell)
    say_what_is_in(console, data, store)
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
    write_json(json_file, json.dumps(figures, indent=1))


@checking_app.command()
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
    from pertoken.inference.model_and_data import model_and_data
    from pertoken.inference.token_losses import token_losses

    console, where = open_console(), (from_hub(model), from_hub(data, "data"))
    loaded, store, tokenizer = model_and_data(*where, overrides or (), on_message=partial(say, console))
    made = np.flatnonzero(store.lines == (store.lines[0] if row is None else row))
    if not len(made):
        lines = f"{store.lines.min()} to {store.lines.max()}"
        raise DataError(f"{data}: row {row} made no sample; those that did are between {lines}")
    show_token_losses(console, token_losses(loaded, store[made[0]], tokenizer), store.where(made[0]))
    if len(made) > 1:
        console.print(f"the first of {len(made):,} samples of this row", highlight=False)


@checking_app.command()
def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The out_dir of a run")],
    step: Annotated[int, typer.Option(help="A step of metrics.jsonl, or the one after its last")],
    worst: Annotated[int, typer.Option(help="For so many of its samples, show the loss of every token")] = 3,
    json_file: JsonFile = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N or mps; auto: as the run, if it is there")] = "auto",
) -> None:
    """Compute a recorded step again, compare it, and show its samples, worst first; exit 1 if it is another."""
    from dataclasses import asdict

    from pertoken.console import show_replay, show_token_losses
    from pertoken.inference.token_losses import token_losses
    from pertoken.runs.replay import for_json
    from pertoken.runs.replay import replay as run_again

    if worst < 0:
        raise RecipeError(f"worst={worst}: must be at least 0")
    console = open_console()
    again = run_again(run, step, device=device, listener=listener_on(console, log_interval=10))
    show_replay(console, again)
    result = again.to_dict()
    for sample, entry in zip(again.samples[:worst], result["samples"], strict=False):
        with again.computation.state.precision.autocast():
            losses = token_losses(again.computation.model, again.computation.store[sample.sample_id], again.tokenizer)
        show_token_losses(console, losses, sample.where)
        entry["losses"] = [asdict(loss) for loss in losses]
    write_json(json_file, json.dumps(for_json(result), indent=1))
    again.raise_if_different()
