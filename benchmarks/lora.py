"""LoRA of SmolLM2-135M on GSM8K: pertoken against TRL's SFTTrainer with peft, in bfloat16.

    python benchmarks/lora.py --model FOLDER [--rounds 2] [--set key=value ...]

Batch 8, cut at 512 tokens; r = 16, alpha = 32, all linear layers of the blocks, no dropout, on both sides. Measured as
smollm.py is, which trains all of the model. "bf16 base" keeps the frozen weights in bfloat16, on either side.
"""

from __future__ import annotations

from common import OURS, claim, main_of, ratio, write
from smollm import RECIPE, arguments_of, measure

LORA = f"""{RECIPE}
[adapter]
kind = "lora"
r = 16
alpha = 32.0
targets = "all-linear"
"""
OURS_LOW, THEIRS, THEIRS_LOW = f"{OURS}, bf16 base", "TRL + peft bf16", "TRL + peft bf16, bf16 base"
THEIRS_WIDE = "TRL + peft fp32"  # the faster one where a processor emulates bfloat16
FLAGS = ["--bf16", "--lora-r", "16", "--lora-alpha", "32"]


def main() -> None:
    arguments = arguments_of(__doc__, "lora")
    found = measure(
        arguments,
        LORA,
        {
            OURS: ([], []),
            THEIRS: ([], FLAGS),
            THEIRS_WIDE: ([], FLAGS[1:]),
            OURS_LOW: (["model.frozen_dtype=bfloat16"], []),
            THEIRS_LOW: ([], [*FLAGS, "--bf16-base"]),
        },
    )
    speed, peak = found.speed, found.peak
    fastest = max(
        (name for name in (THEIRS, THEIRS_LOW, THEIRS_WIDE) if name in speed), key=speed.__getitem__, default=THEIRS
    )
    smallest = min((name for name in (THEIRS, THEIRS_LOW) if name in peak), key=peak.__getitem__, default=THEIRS)
    write(
        arguments.out,
        "lora",
        title="LoRA: SmolLM2-135M on GSM8K",
        settings=found.settings(arguments),
        rows=found.rows,
        claims=[
            claim(f"LoRA, times against {fastest}", ratio(speed.get(OURS), speed.get(fastest)), at_least=2.5, aim=3),
            claim(
                f"LoRA with a bf16 base, peak memory against {smallest}",
                ratio(peak.get(OURS_LOW), peak.get(smallest)),
                at_most=0.4,
                aim=0.3,
            ),
        ],
        notes=[f"{name}: {reason}" for name, reason in found.reasons.items()],
    )


if __name__ == "__main__":
    main_of(main)
