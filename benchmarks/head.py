"""The loss head, forward and backward: time, peak extra memory, and the error of loss and gradients against float64.

    python benchmarks/head.py [--shapes 4096x512x6400 ...] [--shares 0.1 0.4 1.0] [--rounds 2] [--only NAME ...]

Hidden states [N, D] and the head [V, D] are bfloat16 leaves, as autocast makes them; the loss is the mean over the
supervised rows. A contender runs in a process of its own, which warms up (on a small problem, so that what compiles
has compiled, then on this one) and measures time and memory of every further pass. Extra memory is the peak of the
resident set over what was there when a pass began, gradients included. Errors are ||x - x64|| / ||x64||.

- naive: F.cross_entropy(F.linear(hidden, head).float(), labels), all rows
- F.linear_cross_entropy: plain, and with the chunked options it chooses itself
- cut-cross-entropy: its torch_compile implementation, the one that a CPU has (pip install cut-cross-entropy)
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    OURS,
    Failed,
    alternate,
    claim,
    main_of,
    parser_of,
    peak_bytes,
    python,
    ratio,
    resident_bytes,
    run,
    say,
    spread,
    write,
)

if TYPE_CHECKING:
    from torch import Tensor

SHAPES = ("4096x512x6400", "2048x576x49152", "2048x1024x151936")
NAIVE, PLAIN, CHUNKED, CCE = "naive", "F.linear_cross_entropy", "the same, chunked options", "cut-cross-entropy"
CONTENDERS = (OURS, NAIVE, PLAIN, CHUNKED, CCE)
LONG_S = 20.0  # a first pass of this length is measured itself, and none follows
ENOUGH_S = 4.0  # of measured passes in a process, after which none follows
GIVE_UP_S = 45.0  # a contender slower than this at one share is not run at the next


def make_inputs(shape: str, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D] and head [V, D] in bfloat16, labels [N], and which rows are supervised [N]."""
    import torch

    rows, deep, vocabulary = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, deep, generator=generator).bfloat16()
    head = torch.empty(vocabulary, deep, dtype=torch.bfloat16)
    for part in head.split(8192):  # a float32 copy of all of it would raise the baseline
        part.copy_(torch.randn(part.shape, generator=generator) * 0.05)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    supervised = torch.zeros(rows, dtype=torch.bool)
    supervised[torch.randperm(rows, generator=generator)[: max(1, round(share * rows))]] = True
    return hidden, head, labels, supervised


def loss_of(name: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The contender's mean loss from (hidden, head, labels, supervised)."""
    import torch
    import torch.nn.functional as F

    def ignoring(labels: Tensor, supervised: Tensor) -> Tensor:
        return labels.where(supervised, -100)

    if name == OURS:
        from pertoken import linear_cross_entropy

        def ours(hidden: Tensor, head: Tensor, labels: Tensor, supervised: Tensor) -> Tensor:
            out = linear_cross_entropy(hidden, head, labels, supervised)
            return out.loss_sum / out.num_tokens

        return ours
    if name == NAIVE:
        return lambda x, w, y, m: F.cross_entropy(F.linear(x, w).float(), ignoring(y, m))
    if name == PLAIN:
        return lambda x, w, y, m: F.linear_cross_entropy(x, w, ignoring(y, m))
    if name == CHUNKED:
        options = torch.nn.LinearCrossEntropyOptions()
        return lambda x, w, y, m: F.linear_cross_entropy(x, w, ignoring(y, m), options=options)
    function = cut_cross_entropy()
    return lambda x, w, y, m: function(x, w, ignoring(y, m), impl="torch_compile")


def cut_cross_entropy() -> Any:
    """Its function. The package asks for Triton, which has no CPU, unless it believes to be on a Mac."""
    import platform
    from unittest import mock

    with mock.patch.object(platform, "system", return_value="Darwin"):
        from cut_cross_entropy import linear_cross_entropy
    return linear_cross_entropy


def measure(name: str, shape: str, share: float, passes: int, reference: Path | None) -> dict[str, Any]:
    loss_of_inputs = loss_of(name)
    hidden, head, labels, supervised = make_inputs("96x48x500", share)
    loss_of_inputs(hidden.requires_grad_(), head.requires_grad_(), labels, supervised).backward()
    hidden, head, labels, supervised = make_inputs(shape, share)
    hidden.requires_grad_()
    head.requires_grad_()
    seconds, extra, loss = [], [], 0.0
    for i in range(1 + passes):
        hidden.grad = head.grad = None
        gc.collect()
        _trim()
        before = resident_bytes()
        forget_peak()
        start = time.perf_counter()
        result = loss_of_inputs(hidden, head, labels, supervised)
        result.backward()
        took = time.perf_counter() - start
        loss = float(result.detach())
        del result
        if i > 0 or took > LONG_S:
            seconds.append(took)
            extra.append(peak_bytes() - before)
        if took > LONG_S or sum(seconds) > ENOUGH_S:
            break
    found = {"seconds": seconds, "extra_bytes": extra}
    if reference is not None:
        found |= errors(loss, hidden.grad, head.grad, reference)
    return found


def _trim() -> None:
    """Give freed memory back, so that a pass begins without what the last one left."""
    from pertoken.kernels.memory import forget_blocks

    forget_blocks()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def forget_peak() -> None:
    """Let VmHWM begin again from here (Linux, proc(5): clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def write_reference(shape: str, share: float, path: Path) -> None:
    """Loss and gradients in float64, a few rows of logits at a time; the gradients are kept in float32."""
    import torch

    hidden, head, labels, supervised = make_inputs(shape, share)
    d_hidden = torch.zeros(hidden.shape, dtype=torch.float64)
    d_head = torch.zeros(head.shape, dtype=torch.float64)
    wide_head = head.double()
    rows = supervised.nonzero().squeeze(1)
    loss = 0.0
    for part in rows.split(128):
        logits = hidden[part].double() @ wide_head.t()
        log_p = logits.log_softmax(1)
        picked = log_p.gather(1, labels[part, None])
        loss -= float(picked.sum())
        gradient = log_p.exp_()
        gradient.scatter_add_(1, labels[part, None], -torch.ones_like(picked))
        gradient /= len(rows)
        d_hidden[part] = gradient @ wide_head
        d_head.addmm_(gradient.t(), hidden[part].double())
    torch.save({"loss": loss / len(rows), "d_hidden": d_hidden.float(), "d_head": d_head.float()}, path)


def errors(loss: float, d_hidden: Tensor, d_head: Tensor, path: Path) -> dict[str, float]:
    import torch

    reference = torch.load(path, mmap=True)

    def relative(found: Tensor, expected: Tensor) -> float:
        parts = list(zip(found.split(8192), expected.split(8192), strict=True))
        difference = sum(float((a.double() - b.double()).square().sum()) for a, b in parts)
        size = sum(float(b.double().square().sum()) for _, b in parts)
        return (difference / size) ** 0.5

    return {
        "loss_error": abs(loss - reference["loss"]) / reference["loss"],
        "d_hidden_error": relative(d_hidden, reference["d_hidden"]),
        "d_head_error": relative(d_head, reference["d_head"]),
    }


def as_worker(arguments: argparse.Namespace) -> None:
    (shape,), (share,) = arguments.shapes, arguments.shares
    if arguments.worker == "reference":
        write_reference(shape, share, arguments.reference)
    else:
        print(json.dumps(measure(arguments.worker, shape, share, arguments.passes, arguments.reference)))


class Measured:
    """What contenders do at one shape after another; each row of the table, and (seconds, extra bytes) by contender."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.work = arguments, arguments.work.resolve()
        self.too_slow: dict[tuple[str, str], str] = {}
        self.rows: list[dict[str, Any]] = []
        self.figures: dict[tuple[str, float, str], tuple[float, int]] = {}

    def at(self, shape: str, share: float) -> None:
        say(f"{shape}, {share:.0%} supervised")
        script, reference = Path(__file__).resolve(), self.work / "reference.pt"
        command = python(script, "--shapes", shape, "--shares", share, "--passes", self.arguments.passes)
        compare = [] if self.arguments.no_errors else ["--reference", reference]
        if compare:
            run([*command, "--worker", "reference", *compare])
        contenders = {
            name: functools.partial(self.one, name, shape, [*command, "--worker", name], compare)
            for name in self.arguments.only
        }
        results, reasons = alternate(contenders, self.arguments.rounds)
        reference.unlink(missing_ok=True)
        for name, found in results.items():
            row: dict[str, Any] = {"rows x width x vocabulary": shape, "supervised": f"{share:.0%}", "head": name}
            if found:
                seconds = [s for f in found for s in f["seconds"]]
                extra = max(b for f in found for b in f["extra_bytes"])
                self.figures[shape, share, name] = (statistics.median(seconds), extra)
                row |= {"s": spread(seconds), "extra GB": round(extra / 1e9, 3)}
                row |= {k.replace("_", " "): f"{v:.1e}" for k, v in found[0].items() if k.endswith("_error")}
            self.rows.append(row | ({"note": reasons[name][:160]} if name in reasons else {}))

    def one(self, name: str, shape: str, command: list[Any], compare: list[Any], round_: int) -> dict[str, Any]:
        """One process of a contender; the first of them has its errors taken."""
        if reason := self.too_slow.get((name, shape)):
            raise Failed(reason)
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor")}
        lines = run([*command, *([] if round_ else compare)], env=caches).output.splitlines()
        result: dict[str, Any] = json.loads(next(line for line in lines if line.startswith('{"seconds"')))
        if (took := min(result["seconds"])) > GIVE_UP_S:
            self.too_slow[name, shape] = f"measured once at this shape: {took:.0f} s a pass"
        return result


def main() -> None:
    parser = parser_of(__doc__, name="head")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="NxDxV")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.4, 1.0], help="of the rows: supervised")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3, help="of a round, after one to warm up")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--no-errors", action="store_true", help="leave out the comparison with float64")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        as_worker(arguments)
        return

    arguments.work.mkdir(parents=True, exist_ok=True)
    measured = Measured(arguments)
    for shape in arguments.shapes:
        for share in arguments.shares:
            measured.at(shape, share)
    ours, theirs = (measured.figures.get((SHAPES[-1], 0.4, name), (None, None)) for name in (OURS, PLAIN))
    where = "2048 x 1,024 x 151,936, 40% supervised"
    write(
        arguments.out,
        "head",
        title="The loss head, forward and backward, bfloat16",
        settings={"rounds": arguments.rounds, "passes": f"at most {arguments.passes}"},
        rows=measured.rows,
        claims=[
            claim(f"loss head, {where}: times against {PLAIN}", ratio(theirs[0], ours[0]), at_least=2.0, aim=2.7),
            claim(f"loss head, {where}: extra memory against it", ratio(ours[1], theirs[1]), at_most=1.0, aim=0.5),
        ],
    )


if __name__ == "__main__":
    main_of(main)
