"""Every family of our own decoder: errors against transformers, and samples/s against TRL.

    python benchmarks/families.py [--only gemma3 olmo2] [--rounds 2] [--no-speed]

Speed is the steady state of finetune.py: its 30M shape in another family on GSM8K, the same weights and supervised
tokens on both sides, alternately. Errors are those of a small model with random weights, norms among them, and the
largest of any parameter. Logits: by plain modules in float32, the largest difference from transformers', over its
largest logit. Gradient: by plain modules in float64 against a loop over transformers' model in float64, the largest
difference over the largest entry. Kernels: their gradient in float32 against that same loop, norm over norm. Mixtures
have no gradient here: transformers keeps experts in another form.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    DATA,
    FAMILIES,
    OURS,
    ROOT,
    Failed,
    alternate,
    claim,
    existing,
    main_of,
    parser_of,
    python,
    ratio,
    run,
    write,
)
from finetune import MAX_SEQ_LEN, SEED, TRL, Figures, Task

THEIRS = "TRL bf16", "TRL fp32"  # where a processor emulates bfloat16 the second one is faster
BOUNDS = {"logits": 1e-5, "gradient": 1e-10, "kernels": 1e-5}
SMALL = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 160}
LENGTHS = (1, 30, 200)  # longer than the windows


class Float64:
    """`torch` for transformers' modules, which would take rotary angles and norms in float32 even here."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


def errors_of(name: str) -> dict[str, float]:
    import torch
    import transformers

    from pertoken.data.batch.pack import Sample, collate
    from pertoken.engines.cpu.engine import CpuEngine
    from pertoken.folders.open import load_folder, save_folder
    from pertoken.model.decoder import CausalLM
    from pertoken.model.execution import Execution
    from pertoken.recipe.schema import Recipe

    keys = [f"model.{key}={value}" for key, value in (FAMILIES[name] | SMALL).items()]
    model = CausalLM(Recipe.load(ROOT / "recipes" / "gsm8k-30m.toml", keys).model.resolve(101), seed=1)
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(0, 101, (n + 1,), generator=generator) for n in LENGTHS]
    batch = collate([Sample(d.numpy(), torch.ones(len(d) - 1, dtype=torch.bool).numpy()) for d in documents])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        save_folder(model, folder, eos_token_id=None)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = torch.cat([theirs(d[None, :-1]).logits[0] for d in documents])
        found = model.logits(model.hidden_states(batch))
        errors = {"logits": float((found - logits).abs().max() / logits.abs().max())}
        engine = CpuEngine(torch.float32)
        if (reason := engine.supports(model)) is not None:
            raise Failed(f"{name}: the CPU engine does not run it: {reason}")
        if not model.config.use_moe:
            with torch.enable_grad():
                model(batch, Execution(engine)).loss_sum.backward()
            exact = load_folder(folder, dtype=torch.float64)
            for module in (sys.modules[type(theirs).__module__], transformers.modeling_rope_utils):
                module.torch = Float64()
            torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
            torch.set_default_dtype(torch.float64)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
            with torch.enable_grad():
                exact(batch).loss_sum.backward()
                for d in documents:
                    torch.nn.functional.cross_entropy(theirs(d[None, :-1]).logits[0], d[1:], reduction="sum").backward()
            pairs = gradient_pairs(exact, theirs)
            errors["gradient"] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
            pairs = gradient_pairs(model, theirs)
            errors["kernels"] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return errors


def gradient_pairs(ours: Any, theirs: Any) -> list[tuple[Any, Any]]:
    """Of each parameter as it is on disk."""
    from pertoken.folders.fused import fuse

    gradients = fuse({name: parameter.grad for name, parameter in ours.named_parameters()}, ours.config)
    return [(gradient, theirs.get_parameter(name).grad) for name, gradient in gradients.items()]


def speed_of(name: str, arguments: Any, work: Path) -> tuple[Figures, dict[str, str]]:
    data = arguments.data.resolve()
    keys = (
        f"data.path={data / 'sft/gsm8k/train.jsonl'}",
        "data.eval_path=[]",
        f"data.tokenizer={data / 'tokenizer/minimind'}",
        f"data.max_seq_len={MAX_SEQ_LEN}",
        f"data.store={work.parent / 'store'}",
        *(f"model.{key}={value}" for key, value in FAMILIES[name].items()),
        *arguments.set,
    )
    task = Task(ROOT / "recipes" / "gsm8k-30m.toml", keys, work, steps=200)
    batch_size = task.prepare([SEED + r for r in range(arguments.rounds)])["batch_size"]
    stop = arguments.round_steps
    contenders = {
        OURS: lambda r: task.ours(seed=SEED + r, out=work / "run", stop_after=stop),
    }
    for rival in arguments.rivals:
        contenders[rival] = lambda r, rival=rival: task.trl(TRL[rival], seed=SEED + r, stop_after=stop)
    results, reasons = alternate(contenders, arguments.rounds)
    return Figures(results, arguments.warm_up, batch_size), reasons


def arguments_of() -> Any:
    parser = parser_of(__doc__ or "", name="families")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with sft/gsm8k and tokenizer/minimind")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="these families alone")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--round-steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2, help="first steps of a round that do not count")
    parser.add_argument("--rivals", nargs="+", choices=THEIRS, default=list(THEIRS))
    parser.add_argument("--no-speed", action="store_true", help="errors alone")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="recipe keys for pertoken")
    parser.add_argument(
        "--errors-of", choices=FAMILIES, help="print the errors of one family as JSON, and nothing else"
    )
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    if arguments.errors_of:
        print(json.dumps(errors_of(arguments.errors_of)))
        return
    existing(arguments.data, "--data, a folder with sft/gsm8k and tokenizer/minimind")
    rows, claims, notes = [], [], []
    for name in arguments.only:
        errors = json.loads(run(python(__file__, "--errors-of", name)).output.splitlines()[-1])
        row: dict[str, Any] = {"family": name} | {what: f"{error:.0e}" for what, error in errors.items()}
        claims += [claim(f"{name}: {what}", error, at_most=BOUNDS[what]) for what, error in errors.items()]
        if not arguments.no_speed:
            work = arguments.work.resolve() / name
            figures, reasons = speed_of(name, arguments, work)
            shutil.rmtree(work / "start", ignore_errors=True)
            ours, theirs = figures.speed.get(OURS), [figures.speed.get(rival) for rival in arguments.rivals]
            times = ratio(ours, max(filter(None, theirs), default=None))
            row |= {f"{OURS} samples/s": ours, **dict(zip(arguments.rivals, theirs, strict=True)), "times": times}
            claims.append(claim(f"{name}: times against the faster TRL", times, at_least=2.5))
            notes += [f"{name}, {contender}: {reason}" for contender, reason in reasons.items()]
        rows.append(row)
    title = "Families: our own decoder against transformers and TRL"
    write(arguments.out, "families", title=title, rows=rows, claims=claims, notes=notes)


if __name__ == "__main__":
    main_of(main)
