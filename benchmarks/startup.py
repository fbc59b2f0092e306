"""Start-up: `--help`, time to the first step, and time to the first step of a run that goes on at position 10^6.

    python benchmarks/startup.py [--rounds 3] [--samples 2000000] [--position 1000000] [--set key=value ...]

Every time is from the start of the process to the line that says the first step is over, so it has the imports,
hashing the data, opening the store, building the model and that step in it.

The large store has `--samples` samples of 8 tokens, cut from made-up text by pertoken's own preparation, once; it is
kept in the work folder. Nobody waits for the 62,500 steps of 16 samples that lead to position 10^6: a run does two
steps, and its checkpoint is then given that step's number, and its metrics file a row for every step, as the long run
would have left them. The fresh start and the resumed run use the same store and the same model: a tiny one, so that
the store is what is measured, and the 30M model of recipes/gsm8k-30m.toml, whose checkpoint (weights and optimizer,
0.36 GB) must be read and checked as well.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Failed, Finished, alternate, claim, main_of, parser_of, python, run, say, spread, write
from safetensors.torch import save_file

from pertoken.checkpoints.read import LEDGER
from pertoken.tracking.ledger import Ledger
from pertoken.tracking.rows import StepRow

LENGTH, BATCH, DOCUMENT = 8, 16, 20_000
MODELS = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "30M": {"num_key_value_heads": 4, "intermediate_size": 1664, "vocab_size": 6400},
}
RECIPE = """\
stage = "pretrain"
out_dir = "run"
[data]
path = {path}
tokenizer = {tokenizer}
store = {store}
max_seq_len = 8
[train]
batch_size = 16
optimizer = "adamw"
dtype = "float32"
device = "cpu"
[log]
log_interval = 1
[model]
"""


def write_corpus(path: Path, samples: int) -> None:
    """JSON lines of DOCUMENT letters each, enough for `samples`; written once."""
    if path.exists():
        return
    rng = random.Random(0)
    aside = path.with_suffix(".tmp")
    with aside.open("w") as file:
        for _ in range(-(-samples * LENGTH // (DOCUMENT - LENGTH))):
            file.write(json.dumps({"text": "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=DOCUMENT))}) + "\n")
    aside.rename(path)


def write_recipe(path: Path, work: Path, model: dict[str, Any]) -> Path:
    values = {"path": work / f"{work.name}.jsonl", "tokenizer": work / "tokenizer", "store": work / "store"}
    text = RECIPE.format(**{key: json.dumps(str(value)) for key, value in values.items()})
    path.write_text(text + "".join(f"{key} = {value}\n" for key, value in model.items()))
    return path


def pretend_to_be_at(run_dir: Path, position: int) -> int:
    """Number the newest checkpoint as the one after `position` samples, and write the rows that lead there."""
    step = position // BATCH
    checkpoints = run_dir / "checkpoints"
    newest = sorted(p for p in checkpoints.glob("step-*") if p.is_dir())[-1]
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps({**state, "step": step}))
    row = StepRow.from_json(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1]))
    assert row is not None, run_dir
    ledger = Ledger()
    with (run_dir / "metrics.jsonl").open("w") as file:
        for number in range(1, step + 1):
            written = replace(row, step=number, positions=[(number - 1) * BATCH, number * BATCH])
            line = json.dumps(written.to_json())
            file.write(line + "\n")
            ledger.add(written, line.encode())
    save_file(ledger.tensors(), newest / LEDGER)
    manifest = json.loads((newest / "manifest.json").read_text())
    for name in ("trainer_state.json", LEDGER):
        content = (newest / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    newest.rename(checkpoints / f"step-{step:08d}")
    return step


class Large:
    """The large store, and a run on it, for one of the models."""

    def __init__(self, name: str, work: Path, keys: list[str], position: int) -> None:
        self.name, self.work, self.keys, self.position = name, work, keys, position
        self.recipe = write_recipe(work / f"{name}.toml", work, MODELS[name])
        self.saved, self.step = work / f"saved-{name}", position // BATCH
        # as a run of three epochs, so that none of them is near its end
        self.steps = f"train.max_steps={3 * self.step}"

    def prepare(self) -> None:
        shutil.rmtree(self.saved, ignore_errors=True)
        command = ["train", self.recipe, f"out_dir={self.saved}", "train.max_steps=2", *self.keys]
        run(python("-m", "pertoken", *command))
        pretend_to_be_at(self.saved, self.position)

    def _first_step(self, keys: list[object], number: int) -> Finished:
        command = python("-m", "pertoken", "train", self.recipe, self.steps, *self.keys, *keys)
        finished = run(command, stop_after=number)
        if number not in finished.steps():
            raise Failed(f"step {number} never came: {finished.output[-300:]}")
        return finished

    def fresh(self, _: int) -> Finished:
        return self._first_step([f"out_dir={self.work / 'fresh'}", "--overwrite"], 1)

    def resumed(self, _: int) -> Finished:
        again = self.work / "resumed"
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(self.saved, again, symlinks=True)
        return self._first_step([f"out_dir={again}", "--resume"], self.step + 1)


def main() -> None:
    parser = parser_of(__doc__, name="startup")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2_000_000, help="in the large store")
    parser.add_argument("--position", type=int, default=1_000_000, help="where the resumed run goes on")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="recipe keys for pertoken")
    arguments = parser.parse_args()

    work = arguments.work.resolve() / str(arguments.samples)
    work.mkdir(parents=True, exist_ok=True)
    write_corpus(work / f"{work.name}.jsonl", arguments.samples)
    letters = work / "letters.txt"
    letters.write_text("abcdefghijklmnopqrstuvwxyz\n")
    if not (work / "tokenizer").exists():
        command = ["tokenizer", "train", letters, "--kind", "char", "--out", work / "tokenizer"]
        run(python("-m", "pertoken", *command))
    say(f"preparing a store of {arguments.samples:,} samples, once")
    recipe = write_recipe(work / "prepare.toml", work, MODELS["tiny"])
    prepared = run(python("-m", "pertoken", "prepare", recipe))

    contenders: dict[str, Any] = {"pertoken --help": lambda _: run(python("-m", "pertoken", "--help"))}
    for name in arguments.models:
        large = Large(name, work, arguments.set, arguments.position)
        large.prepare()
        contenders[f"{name}, fresh start"] = large.fresh
        contenders[f"{name}, resumed at {arguments.position:,}"] = large.resumed
    small = write_recipe(work / "small.toml", work, MODELS["tiny"])
    keys = [
        f"data.path={letters}",
        f"data.store={work / 'small-store'}",
        f"out_dir={work / 'small'}",
        "train.max_steps=1",
    ]

    def cold(_: int) -> Finished:
        shutil.rmtree(work / "small-store", ignore_errors=True)
        return run(python("-m", "pertoken", "train", small, *keys, *arguments.set, "--overwrite"), stop_after=1)

    contenders["a few lines, no store yet"] = cold
    results, reasons = alternate(contenders, arguments.rounds)
    if reasons:
        raise Failed("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))

    times = {n: [min(f.steps().values(), default=f.wall_s) for f in found] for n, found in results.items()}
    rows = [
        {"what": name, "s": spread(seconds), "peak GB": round(max(f.peak_bytes for f in results[name]) / 1e9, 2)}
        for name, seconds in times.items()
    ]
    claims = []
    for name in arguments.models:
        late = [
            b - a
            for a, b in zip(
                times[f"{name}, fresh start"], times[f"{name}, resumed at {arguments.position:,}"], strict=True
            )
        ]
        rows.append({"what": f"{name}, resumed minus fresh, round by round", "s": spread(late)})
        text = f"resume at position {arguments.position:,}, {name} model: seconds more to the first step than afresh"
        claims.append(claim(text, spread(late)["median"], at_most=1.0, aim=0.2))
    write(
        arguments.out,
        "startup",
        title="Start-up",
        settings={"samples in the large store": f"{arguments.samples:,}", "rounds": arguments.rounds},
        rows=rows,
        claims=claims,
        notes=[f"the store was opened, or made, in {prepared.wall_s:.1f} s before"],
    )


if __name__ == "__main__":
    main_of(main)
