"""Every benchmark that can run here, one after the other, and one table of them all: `make bench`.

    python benchmarks/bench.py [--quick] [--minimind CHECKOUT] [--nanogpt CHECKOUT] [--model FOLDER] [--long RECIPE]

Each part is a script of its own (`python benchmarks/finetune.py --help`) and writes its own table; this runs them and
puts what they wrote together in OUT/bench.md and OUT/bench.json, the claims of the project first. `--quick` checks in
some minutes that everything works: its figures are of few steps, on small problems, and mean nothing. What cannot run
(no checkout, no data, a package missing) is named with the reason and counts as not measured, never as passed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import DATA, ROOT, describe, machine, main_of, parser_of, say, table, to_markdown

PARTS = ("startup", "norm", "head", "pretrain", "finetune", "smollm", "shakespeare", "prepare", "saving")
HERE = Path(__file__).resolve().parent
QUICK = {
    "startup": ["--rounds", "1", "--samples", "50000", "--position", "20000"],
    "norm": ["--rounds", "1", "--numbers", "300000"],
    "head": ["--rounds", "1", "--passes", "1", "--shapes", "512x64x6400", "--shares", "0.4"],
    "pretrain": ["--rounds", "1", "--steps", "3", "--warm-up", "1", "--repeats", "3"],
    "finetune": [
        *("--only", "pertoken", "TRL bf16", "MiniMind"),
        *"--rounds 1 --round-steps 4 --warm-up 2 --steps 8 --eval-rows 20 --set model.hidden_size=128".split(),
        *"model.intermediate_size=448 train.warmup_steps=2 train.batch_size=4".split(),
    ],
    "smollm": ["--rounds", "1", "--round-steps", "2", "--warm-up", "1"],
    "saving": "--rounds 1 --steps 8 --interval 2 --set model.hidden_size=128 model.intermediate_size=448".split(),
    "shakespeare": "--rounds 1 --nanogpt-iterations 20 --set train.max_steps=40 train.warmup_steps=5".split(),
}
FULL = {"head": ["--rounds", "1"]}
# With nothing given: about how long, in minutes, on two quiet cores; shown so that nobody waits in the dark.
MINUTES = {
    "startup": 4,
    "norm": 1,
    "head": 10,
    "pretrain": 3,
    "finetune": 38,
    "smollm": 6,
    "shakespeare": 5,
    "prepare": 5,
    "saving": 9,
}


def command_of(part: str, arguments: Any) -> list[str]:
    command = [sys.executable, str(HERE / f"{part}.py"), "--out", str(arguments.out)]
    if arguments.work and part != "prepare":
        command += ["--work", str(arguments.work / part)]
    given = {
        "finetune": [("--minimind", arguments.minimind), ("--data", arguments.data)],
        "smollm": [("--model", arguments.model), ("--data", arguments.data)],
        "shakespeare": [
            ("--nanogpt", arguments.nanogpt),
            ("--recipe", arguments.shakespeare_recipe),
            ("--long", arguments.long),
            ("--data", arguments.data),
        ],
    }
    for name, value in given.get(part, []):
        command += [name, str(value)] if value else []
    return command + (QUICK.get(part, ["--quick"]) if arguments.quick else FULL.get(part, []))


def follow(command: list[str]) -> tuple[int, str]:
    """Run a part, let its words through, and return its exit code and the last line of its progress."""
    last = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                last = line.strip() or last
                say(line.rstrip())
        except BaseException:
            process.terminate()  # it ends the contender that it is waiting for
            raise
    return process.returncode, last


def section(result: dict[str, Any]) -> str:
    """A part's section; one that writes other keys is shown as it is."""
    try:
        return to_markdown(result)
    except (KeyError, TypeError):
        return f"## {result.get('name', 'a part')}\n\n```json\n{json.dumps(result, indent=1)}\n```\n"


def together(out: Path, parts: list[str], missing: dict[str, str], quick: bool) -> None:
    """OUT/bench.json and OUT/bench.md from what the parts wrote."""
    results = [json.loads((out / f"{part}.json").read_text()) for part in parts if part not in missing]
    claims = [line for result in results for line in result.get("claims", [])]
    if quick:  # of other problems than the claims are about
        claims = [{**line, "verdict": "not measured", "note": "quick"} for line in claims]
    where = machine()
    head = [
        "# Benchmarks",
        *(["**Quick: to see that all of it runs. The figures mean nothing.**"] if quick else []),
        describe(where),
        *([table(claims)] if claims else []),
        *(["\n".join(f"- {part}: not run, {why}" for part, why in missing.items())] if missing else []),
    ]
    sections = [section(result) for result in results]
    (out / "bench.md").write_text("\n\n".join(head + sections), encoding="utf-8")
    whole = {"machine": where, "quick": quick, "claims": claims, "not_run": missing, "parts": results}
    (out / "bench.json").write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n\n".join(head))


def main() -> None:
    parser = parser_of(__doc__, name="bench")
    parser.set_defaults(work=None)
    parser.add_argument("--quick", action="store_true", help="only see that everything works")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minimind", type=Path, help="a checkout of MiniMind")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--model", type=Path, help="a folder of SmolLM2-135M with safetensors")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--shakespeare-recipe", type=Path, default=ROOT / "recipes" / "shakespeare-char.toml")
    parser.add_argument("--long", type=Path, metavar="RECIPE", help="a recipe of 20 minutes for Tiny Shakespeare")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    missing, parts = {}, []
    for part in arguments.only:
        if not (HERE / f"{part}.py").exists():
            continue
        parts.append(part)
        (arguments.out / f"{part}.json").unlink(missing_ok=True)
        say(f"\n== {part}" + ("" if arguments.quick else f", about {MINUTES[part]} minutes"))
        start = time.perf_counter()
        code, last = follow(command_of(part, arguments))
        say(f"== {part} took {time.perf_counter() - start:.0f} s")
        if code or not (arguments.out / f"{part}.json").exists():
            missing[part] = last or f"exit code {code}"
    together(arguments.out, parts, missing, arguments.quick)


if __name__ == "__main__":
    main_of(main)
