"""`pertoken audit`: the command, and what it shows in the terminal. Everything heavy is imported inside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pertoken.cli.shared import JsonFile, Overrides, listener_on, open_console, say, write_text
from pertoken.errors import CheckFailed, RecipeError
from pertoken.text import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pertoken.audit import Audit
    from pertoken.audit.audit import PartAudit

__all__ = ["audit_app"]

audit_app = typer.Typer(rich_markup_mode=None)

_PLACES = 6  # of a problem that are shown
_BAR = 40  # characters of the longest bar
_EXAMPLE_CHARACTERS = 600
_FILES = 40  # that are shown
_LOST = ("skipped", "overlong", "truncated", "unsupervised", "too_short")


@audit_app.command(name="audit")
def audit_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; `pertoken new sft` prints one")],
    overrides: Overrides = None,
    json_file: JsonFile = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page too")] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", metavar="FILE", help="Write every sample as a line of JSON")
    ] = None,
) -> None:
    """Look a recipe's data through before a step is paid for; exit 1 if a sample would be lost or trained wrongly."""
    from pertoken.recipe.schema import Recipe

    parsed = Recipe.load(recipe, overrides or ())

    from pertoken.audit import audit
    from pertoken.audit.audit import write_samples
    from pertoken.files import user_path

    console = open_console()
    listener = listener_on(console, log_interval=1)
    for remark in parsed.remarks:
        listener.message(remark)
    result = audit(parsed, listener, name=str(recipe))
    show_audit(console, result)
    write_text(json_file, json.dumps(result.to_dict(), indent=1) + "\n", "json")
    if html is not None:
        from pertoken.report.audit import audit_page

        write_text(html, audit_page(result.to_dict()), "html")
    if samples is not None:
        try:
            write_samples(result, user_path(samples, "samples"))
        except OSError as error:
            raise RecipeError(f"samples={samples}: cannot be written ({error.strerror})") from None
    if not result.ok:
        times = "time" if result.harmed == 1 else "times"
        raise CheckFailed(
            f"{result.harmed:,} {times} a sample would be lost or trained wrongly: see the problems above"
        )


def show_audit(console: Console, audit: Audit) -> None:
    """Files, figures, problems with their places, and samples with their supervised tokens in color."""
    from rich.text import Text

    from pertoken.console import duration, pieces_text
    from pertoken.text import plain

    for part in audit.parts:
        name = {"train": "training data", "eval": "evaluation data"}[part.part]
        held = ", held out from the training files" if part.held_out else ""
        say(console, f"{name}{held}: {_figures(part.samples, part.num_tokens, part.tokens)}")
        console.print(_files_table(part))
        _show_lengths(console, part)
    plan, needs = audit.plan, audit.estimate
    epochs = "epoch" if plan.epochs == 1 else "epochs"
    padding = "" if plan.padding_share is None else f", {plan.padding_share:.1%} of the work on padding"
    say(
        console,
        f"steps: {plan.total_steps:,} of {counted(plan.batch_size, 'sample')}, {plan.epochs:.3g} {epochs}; "
        f"{plan.micro_batches:.3g} micro-batches a step{padding}",
    )
    if needs is None:
        say(console, "memory: not known, since no configuration of the decoder says how large the model is")
    else:
        from pertoken.training.memory import size_text

        parts = ", ".join(f"{name} {size_text(size)}" for name, size in needs.memory_bytes.items())
        there = "" if needs.memory_available_bytes is None else f" of {size_text(needs.memory_available_bytes)}"
        if needs.seconds is not None:
            say(console, f"time: about {duration(needs.seconds)}, by two passes with random weights on this machine")
        say(console, f"memory: about {size_text(needs.memory_total_bytes)}{there} ({parts}; {needs.how})")
        methods = ", ".join(f"{name} {size_text(size)}" for name, size in needs.memory_by_method.items())
        say(console, f"memory by method, the rest as in the recipe: {methods}")
    console.print()
    for problem in audit.problems:
        more = ", ..." if problem.count > min(len(problem.places), _PLACES) else ""
        kind = Text("problem  ", style="bold red") if problem.harms else Text("note     ", style="yellow")
        console.print(kind.append(plain(f"{problem.what} ({_places(problem.places)}{more})"), style="default"))
    if not audit.problems:
        say(console, "no problem found")
    for example in audit.examples:
        say(console, f"\n{example.source} ({example.why}); what is between ⟦ and ⟧ is supervised:")
        console.print(pieces_text(example.pieces, _EXAMPLE_CHARACTERS))


def _figures(samples: int, num_tokens: float, tokens: int) -> str:
    share = f" ({num_tokens / tokens:.1%})" if tokens else ""
    return f"{counted(samples, 'sample')}, {num_tokens:,} of {tokens:,} tokens supervised{share}"


def _files_table(part: PartAudit) -> Table:
    """A line a file; columns of what was lost only where something was."""
    from rich.table import Table
    from rich.text import Text

    from pertoken.text import one_line

    lost = [name for name in _LOST if any(getattr(file, name) for file in part.files)]
    table = Table("file", "kind", "rows", "samples", "tokens", "supervised", *(name.replace("_", " ") for name in lost))
    for file in part.files[:_FILES]:
        rows = "" if file.rows is None else f"{file.rows:,}"
        counts = (rows, f"{file.samples:,}", f"{file.tokens:,}", f"{file.num_tokens:,}")
        table.add_row(Text(one_line(file.file)), file.kind, *counts, *(f"{getattr(file, name):,}" for name in lost))
    if len(part.files) > _FILES:
        table.add_row(f"and {len(part.files) - _FILES:,} more")
    return table


def _show_lengths(console: Console, part: PartAudit) -> None:
    edges, counts = part.lengths["edges"], part.lengths["counts"]
    most, width = max(counts), len(f"{edges[-1]:,}")
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "█" * -(-count * _BAR // most)
        say(console, f"  {low + 1:>{width},} to {high:>{width},} inputs  {bar} {count:,}")


def _places(places: Sequence[str]) -> str:
    """Of places in one file, which is named once, their lines."""
    shown, before = [], ""
    for place in places[:_PLACES]:
        file, _, line = place.rpartition(":")
        shown.append(line if file == before else place)
        before = file
    return ", ".join(shown)
