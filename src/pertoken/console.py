"""What the command line shows: the summary, progress, tables. Everything from users or data is shown as plain text."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pertoken.errors import OutputLost
from pertoken.inference.token_losses import TokenLoss
from pertoken.prove.report import Proof, Result
from pertoken.text import plain, reason
from pertoken.tracking.listener import Heard, Listener
from pertoken.tracking.rows import StepRow
from pertoken.tracking.summary import Summary
from pertoken.training.gradient_stats import GradStats

if TYPE_CHECKING:
    from pertoken.runs.replay import Replay

__all__ = [
    "ConsoleListener",
    "duration",
    "pieces_text",
    "show_proof",
    "show_proof_header",
    "show_replay",
    "show_result",
    "show_token_losses",
]

_EXAMPLE_CHARACTERS = 1200


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "an unknown time"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class ConsoleListener(Heard):
    """Prints: a progress bar in a terminal, a line per `log_interval` everywhere. What goes wrong in it ends no
    training: it is said, and nothing more is shown."""

    def __init__(self, console: Console, *, log_interval: int, words: Callable[[str], str] = lambda text: text) -> None:
        """`words`: how a message is said to whoever reads the console; the command line has flags for arguments."""
        self._printer = _Printer(console, log_interval=log_interval)
        self._words = words
        super().__init__(self._printer)

    def failed(self, problem: BaseException) -> None:
        if not isinstance(problem, Exception) or isinstance(problem, OutputLost):  # meant to end the command
            raise problem
        self.close()
        what = f"{type(problem).__name__}: {reason(problem)}"
        print(f"the display failed ({what}); from here on there are messages only, the work continues", file=sys.stderr)

    def message(self, text: str) -> None:
        text = self._words(text)
        super().message(text)
        if self.problem is not None:
            print(plain(text), file=sys.stderr)

    def close(self) -> None:
        with suppress(Exception):  # its last look at the display
            self._printer.close()


class _Printer(Listener):
    def __init__(self, console: Console, *, log_interval: int) -> None:
        self._console = console
        self._log_interval = log_interval
        self._progress: Progress | None = None
        self._task: Any = None
        self._since: float | None = None  # when what shows an amount of bytes began

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def preparing(self, done_bytes: int, total_bytes: int) -> None:
        self._amount("tokenizing", "tokenized", done_bytes, total_bytes)

    def downloading(self, done_bytes: int, total_bytes: int) -> None:
        self._amount("downloading", "downloaded", done_bytes, total_bytes)

    def _amount(self, doing: str, done: str, done_bytes: int, total_bytes: int) -> None:
        self._since = self._since or time.perf_counter()
        if self._console.is_terminal:
            end = "\n" if done_bytes == total_bytes else "\r"
            self._console.print(f"{doing} {done_bytes / 1e6:,.1f} of {total_bytes / 1e6:,.1f} MB", end=end)
        elif done_bytes == total_bytes:
            took = time.perf_counter() - self._since
            self._console.print(f"{done} {total_bytes / 1e6:,.1f} MB in {duration(took)}")
        if done_bytes == total_bytes:
            self._since = None

    def needs(self, memory: str) -> None:
        self._console.print(f"memory: {memory}", soft_wrap=True)

    def started(self, summary: Summary) -> None:
        self._console.print(_summary_text(summary), end="")
        self._console.print(_example(summary))
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=summary.total_steps, completed=summary.start_step, status="")
        self._progress.start()

    def stepped(self, row: StepRow, summary: Summary) -> None:
        text = f"loss {row.loss:.4f}  lr {row.lr:.2e}  norm {row.grad_norm:.3f}  {row.tokens_per_s:,.0f} tok/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=row.step, status=text)
        steps_per_epoch = -(-summary.num_samples // summary.batch_size)
        last = row.step in (summary.total_steps, row.epoch * steps_per_epoch)
        if row.eval_loss is not None:
            text += f"  eval {row.eval_loss:.4f}  ppl {row.eval_perplexity:.2f}  bits/byte {row.eval_bits_per_byte:.3f}"
        if row.eval_sources:
            text += "  (" + ", ".join(f"{name} {loss:.4f}" for name, loss in row.eval_sources.items()) + ")"
        if last or row.eval_loss is not None or row.step % self._log_interval == 0 or row.step == 1:
            self._console.print(f"step {row.step:>{len(str(summary.total_steps))}}  {text}", highlight=False)

    def evaluating(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, status="evaluating")

    def gradients(self, stats: Sequence[GradStats]) -> None:
        table = Table("parameter", "mean", "std", "norm", title="gradients of this step, before clipping")
        for s in stats:
            if s.norm is None:
                table.add_row(Text(plain(s.name)), "no gradient", "", "", style="red")
            else:
                table.add_row(Text(plain(s.name)), f"{s.mean:.3e}", f"{s.std:.3e}", f"{s.norm:.3e}")
        self._console.print(table)

    def message(self, text: str) -> None:
        self._console.print(Text(plain(text), style="yellow"))


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1_000_000 else f"{count:,}"


def _count(num_tokens: float) -> str:
    """Supervised tokens; the sum of their weights need not be whole."""
    return f"{num_tokens:,}" if isinstance(num_tokens, int) else f"{num_tokens:,.1f}"


def _summary_text(s: Summary) -> Text:
    share = s.num_tokens / s.total_tokens
    per_step = min(1.0, s.batch_size / s.num_samples)
    steps = f"{s.total_steps:,} over {s.epochs} epoch{'' if s.epochs == 1 else 's'}"
    if s.start_step:
        steps += f", going on after step {s.start_step:,}"
    is_mixture = s.num_active_parameters < s.num_parameters
    active = f" ({_millions(s.num_active_parameters)} active for a token)" if is_mixture else ""
    if s.num_trained_parameters < s.num_parameters:
        active += f", {_millions(s.num_trained_parameters)} of them trained"
    rows = [
        ("run", f"{s.stage} into {s.out_dir}"),
        ("model", f"{s.family}, {_millions(s.num_parameters)} parameters{active}, {s.dtype} on {s.device}"),
        ("engine", f"{s.engine}: {s.engine_note}"),
        ("samples", f"{s.num_samples:,} to train on, {s.num_eval_samples:,} to evaluate on"),
        ("supervised", f"{_count(s.num_tokens)} of {s.total_tokens:,} tokens ({share:.1%})"),
        *(("", note) for note in s.data_notes),
        (
            "step",
            f"{min(s.batch_size, s.num_samples)} samples, about {s.num_tokens * per_step:,.0f} supervised tokens; "
            f"{s.world_size} rank{'s' if s.world_size > 1 else ''} x {s.micro_batches} "
            f"micro-batch{'es' if s.micro_batches > 1 else ''}, {s.padding_share:.1%} of the work on padding",
        ),
        ("steps", steps),
        ("expected", f"about {duration(s.expected_s)}"),
    ]
    text = Text()
    for name, value in rows:
        text.append(f"{name:<12}", style="dim").append(f"{plain(value)}\n")
    return text


def _example(s: Summary) -> Text:
    head = Text("\na sample, ").append(plain(s.example_source)).append("; what is between ⟦ and ⟧ is supervised:\n")
    return head.append(pieces_text(s.example, _EXAMPLE_CHARACTERS)).append("\n")


def pieces_text(pieces: Sequence[tuple[str, bool]], left: int) -> Text:
    """Up to `left` characters of a sample; what is supervised is green and in brackets."""
    text = Text()
    for piece, supervised in pieces:
        shown = plain(piece[:left])
        text.append(f"⟦{shown}⟧" if supervised else shown, style="green" if supervised else "dim")
        left -= len(shown)
        if left <= 0:
            text.append(" ...")
            break
    return text


def show_token_losses(console: Console, losses: Sequence[TokenLoss], source: str) -> None:
    """A table of a sample's tokens; supervised rows are green and marked."""
    table = Table("position", "token", "label", "label id", "supervised", "loss (nats)", title=Text(plain(source)))
    for row in losses:
        table.add_row(
            str(row.position),
            Text(repr(row.token)[1:-1]),
            Text(repr(row.label)[1:-1]),
            str(row.label_id),
            ("yes" if row.weight == 1 else f"{row.weight:g}") if row.supervised else "-",
            f"{row.loss:.4f}",
            style="green" if row.supervised else "dim",
        )
    console.print(table)
    total, counted = sum(row.weight for row in losses), sum(row.supervised for row in losses)
    mean = f"{sum(row.weight * row.loss for row in losses) / total:.4f} nats" if total else "none"
    weighted = f" with a weight of {total:g}" if total != counted else ""
    console.print(
        f"{counted} of {len(losses)} tokens supervised{weighted}; mean loss of these: {mean}", highlight=False
    )


def show_replay(console: Console, replay: Replay) -> None:
    """The step's figures beside the recorded ones, and its samples, worst first."""
    source = "the start" if replay.checkpoint is None else replay.checkpoint.name
    lines = [f"step {replay.step}, rebuilt from {source} by repeating {replay.repeated} steps"]
    if replay.problem is not None:
        lines.append(f"not finite: {replay.problem}")
    if replay.compared:
        lines.append(f"{'':<12}{'recorded':<24}{'replayed':<24}(rounding: up to {replay.rounding:g} of the value)")
        lines += [f"{c.name:<12}{c.recorded!s:<24}{c.replayed!s:<24}{c.verdict}" for c in replay.compared]
    else:
        lines.append("metrics.jsonl has no row of this step, so there is nothing to compare with")
    lines += ["", f"{'mean loss':>10}{'supervised':>12}{'tokens':>9}  sample"]
    lines += [f"{s.loss:>10.4f}{s.num_tokens:>12g}{s.tokens:>9}  {s.where}" for s in replay.samples]
    for line in lines:
        console.print(Text(plain(line)))


_PROOF_LINE = "{:<29}{:<10}{:>9}{:>10}{:>10}{:>10}  {:<9}{}"
_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow", "differs": "yellow"}


def show_proof_header(console: Console) -> None:
    """The head of the table that `show_result` adds lines to."""
    head = _PROOF_LINE.format("class", "dtype", "gradient", "at most", "norm - 1", "loss", "verdict", "worst parameter")
    console.print(Text(head, style="bold"))


def show_result(console: Console, result: Result) -> None:
    """One line of the table; errors are relative, the largest over parameters."""

    def number(value: float) -> str:
        return "" if math.isnan(value) else f"{value:.1e}"

    has_gradient = not math.isnan(result.gradient_error)
    line = _PROOF_LINE.format(
        result.name,
        result.dtype,
        number(result.gradient_error),
        number(result.tolerance) if has_gradient else "",
        number(result.norm_ratio - 1),
        number(result.loss_difference),
        result.verdict,
        f"{result.worst}; {result.note}" if result.worst and result.note else result.worst or result.note,
    )
    console.print(Text(plain(line), style=_STYLES[result.verdict]))


def show_proof(console: Console, proof: Proof) -> None:
    """What the results are about, and where their bounds come from."""
    cut = f", {proof.cut} of them in part" if proof.cut else ""
    lines = [
        "",
        f"{proof.model}; {proof.tokens:,} tokens, {proof.supervised:,} supervised, of {', '.join(proof.samples)}{cut}",
        "gradient: max |g - reference| / max |reference|, of the worst parameter. The reference: one sample at a time,",
        "all logits, float64. Bounds: float64 1e-10; float32 four times the reference's own error in float32;",
        "bfloat16 a loss apart by less than 1e-3 nats on average over the first 20 steps, and no trend.",
        *proof.notes,
        f"{'every class passed' if proof.holds else 'FAILED'}, {duration(proof.seconds)}",
    ]
    for line in lines:
        console.print(Text(plain(line)))
