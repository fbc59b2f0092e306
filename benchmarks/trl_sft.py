"""A contender: TRL's SFTTrainer on what inputs.py made. It knows nothing of pertoken.

    python benchmarks/trl_sft.py --work DIR --seed 42 --steps 200 [--bf16] [--torch-compile] [--out FOLDER]
        [--lora-r 16 --lora-alpha 32 [--bf16-base]]

Same weights, samples, order, batch, AdamW groups, clipping and learning rates. SFTTrainer's recomputation of
activations, on by default, is off: it saves memory and costs time, and pertoken's default is off too. Nothing is
logged, evaluated or saved on the way. Prints a line as each step ends.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Announce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step}", flush=True)


def with_adapter(model, r: int, alpha: int):
    """Its A and B are float32, whatever the base is."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--torch-compile", action="store_true")
    parser.add_argument("--lora-r", type=int, help="train an adapter of peft's, of all linear layers")
    parser.add_argument("--lora-alpha", type=int, default=32)
    parser.add_argument("--bf16-base", action="store_true", help="keep the weights that are frozen in bfloat16")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    inputs = json.loads((arguments.work / "inputs.json").read_text())
    with (arguments.work / f"rows-{arguments.seed}.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    start = arguments.work / "start"
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16 if arguments.bf16_base else torch.float32)
    if arguments.lora_r is not None:
        model = with_adapter(model, arguments.lora_r, arguments.lora_alpha)
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": inputs["weight_decay"]},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=tuple(inputs["betas"]), fused=True)
    lr = inputs["lr"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr[min(step, len(lr) - 1)])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(arguments.work / "trl"),
            max_steps=arguments.steps,
            per_device_train_batch_size=inputs["batch_size"],
            max_grad_norm=inputs["grad_clip"],
            max_length=None,  # the rows are cut already
            train_sampling_strategy="sequential",
            use_cpu=True,
            bf16=arguments.bf16,
            torch_compile=arguments.torch_compile,
            gradient_checkpointing=False,
            activation_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
        optimizers=(optimizer, schedule),
        callbacks=[Announce()],
    )
    trainer.train()
    if arguments.out:
        trainer.save_model(str(arguments.out))


if __name__ == "__main__":
    main()
