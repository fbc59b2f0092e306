"""Peak memory of three training steps by method, measured and computed, for shapes with random weights.

    python benchmarks/memory.py [--only 135M 270M] [--methods full lora]

The shapes are those of SmolLM2-135M, Gemma 3 270M and Qwen3-0.6B. Each row is a process of its own: weights from a
bfloat16 folder, bfloat16 compute, batches of one sample of some 300 tokens. Measured is the most that the process had
of pages of its own (RssAnon, looked at every 2 ms) from its start to the end of the last step, less what it had after
imports; files that are mapped do not count, nor does the checkpoint at the end. Computed is `training_bytes`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from common import claim, main_of, parser_of, python, run, say, write

STEPS, BATCH, LENGTH = 3, 1, 300
CLOSE = 0.2  # of measured, how far computed may be off

CHILD = """
import json, os, re, sys, threading, time
from pathlib import Path
import torch
from pertoken import Recipe, train
from pertoken.runs import assemble
from pertoken.tracking.listener import Listener
from pertoken.folders.config import config_from_hf
from pertoken.training.memory import training_bytes

def own():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

class Watch(Listener):
    def __init__(self):
        self.peak = 0
    def stepped(self, row, summary):
        if row.step == int(sys.argv[2]):  # the checkpoint at the end is another matter
            parts = training_bytes(recipe, config)
            print(json.dumps({"peak": max(self.peak, own()) - start, "parts": parts}), flush=True)
            os._exit(0)
    def look(self):
        while True:
            self.peak = max(self.peak, own())
            time.sleep(0.002)

assemble.seconds_per_token = lambda *_: float("nan")  # nobody asks how long it will take
recipe = Recipe.parse(json.loads(sys.argv[1]))
config = config_from_hf(json.loads(Path(recipe.init_from, "config.json").read_text()))
watch = Watch()
start = own()
threading.Thread(target=watch.look, daemon=True).start()
train(recipe, overwrite=True, listener=watch)
"""


def shapes() -> dict[str, Any]:
    from pertoken.training.fits import SHAPES

    return SHAPES


def make_model(folder: Path, config: Any) -> None:
    import torch

    from pertoken.folders.open import save_folder
    from pertoken.model.decoder import CausalLM

    model = CausalLM(config, seed=0, dtype=torch.bfloat16)
    save_folder(model, folder, eos_token_id=2)


def make_data(folder: Path, length: int) -> tuple[Path, Path]:
    """(chats, a tokenizer whose tokens are characters)"""
    from pertoken.data.tokens.train import train_tokenizer

    chats, sentence = folder / "chats.jsonl", "the quick brown fox jumps over the lazy dog "
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}?"},
                {"role": "assistant", "content": (sentence * 9)[:length]},
            ]
        }
        for i in range(STEPS * BATCH)
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_tokenizer([str(chats)], vocab_size=None, kind="char", out_dir=folder / "tokenizer")
    return chats, folder / "tokenizer"


def recipe_of(
    changes: dict[str, Any], model: Path, work: Path, chats: Path, tokenizer: Path, length: int
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "stage": "sft",
        "out_dir": str(work / "run"),
        "init_from": str(model),
        "data": {"path": str(chats), "tokenizer": str(tokenizer), "max_seq_len": 2 * length},
        "train": {"max_steps": STEPS, "batch_size": BATCH, "micro_batch_tokens": BATCH * length, "dtype": "bfloat16"},
        "checkpoint": {"async_save": False, "save_optimizer": False},
    }
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


def main() -> None:
    parser = parser_of(__doc__ or "", name="memory")
    parser.add_argument("--only", nargs="*", default=["135M", "270M", "0.6B"])
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sample, about")
    parser.add_argument("--steps", type=int, default=STEPS, help="from the second on, each takes the same")
    args = parser.parse_args()
    from pertoken.training.methods import METHODS

    rows, claims = [], []
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        chats, tokenizer = make_data(work, args.length - 20)
        for shape in args.only:
            make_model(work / shape, shapes()[shape])
            for method in args.methods or METHODS:
                recipe = recipe_of(METHODS[method], work / shape, work, chats, tokenizer, args.length)
                done = run(python("-c", CHILD, json.dumps(recipe), args.steps))
                found = json.loads(done.output.strip().splitlines()[-1])
                computed = sum(found["parts"].values())
                row = {"model": shape, "method": method, "measured GB": round(found["peak"] / 1e9, 2)}
                row |= {
                    "computed GB": round(computed / 1e9, 2),
                    "computed / measured": round(computed / found["peak"], 2),
                }
                rows.append(row | {name: round(size / 1e9, 2) for name, size in found["parts"].items()})
                say(json.dumps(rows[-1]))
                off = abs(computed / found["peak"] - 1)
                claims.append(claim(f"{shape}, {method}: computed is within 20% of measured", off, at_most=CLOSE))
    write(args.out, "memory", title="Peak memory by method", rows=rows, claims=claims)


if __name__ == "__main__":
    main_of(main)
