"""What contenders start from, made once and alike for all: a model folder, and a recipe's samples in order.

    python benchmarks/inputs.py recipes/gsm8k-30m.toml --work DIR --steps 200 --seeds 42 43 [key=value ...]

DIR/start is the model, as a Hugging Face folder; DIR/rows-SEED.jsonl has the samples of the first steps as
`input_ids` and `labels` (-100 where pertoken supervises nothing), so that no contender trains on other tokens than
another; DIR/inputs.json has the recipe's optimizer settings and the learning rate of every step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pertoken import Recipe, load_model, load_tokenizer
from pertoken.data.batch.order import step_at
from pertoken.folders.open import save_folder
from pertoken.model.decoder import CausalLM
from pertoken.runs.data import prepare
from pertoken.training.schedule import lr_at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    arguments = parser.parse_args()

    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    source = recipe.data.tokenizer or recipe.init_from
    assert source is not None, "Recipe requires one of them"
    tokenizer = load_tokenizer(source)
    if recipe.init_from is None:
        model = CausalLM(recipe.model.resolve(len(tokenizer)), seed=recipe.train.seed)
    else:
        model = load_model(recipe.init_from)
    save_folder(model, arguments.work / "start", tokenizer=tokenizer, eos_token_id=tokenizer.eos_token_id)

    store, _ = prepare(recipe)
    train = recipe.train
    lengths = []
    for seed in arguments.seeds:
        with (arguments.work / f"rows-{seed}.jsonl").open("w") as file:
            for step in range(1, arguments.steps + 1):
                at = step_at(step, num_samples=len(store), batch_size=train.batch_size, seed=seed)
                for i in at.sample_ids:
                    sample = store[int(i)]
                    pairs = zip(sample.labels.tolist(), sample.loss_mask.tolist(), strict=True)
                    labels = [-100] + [token if supervised else -100 for token, supervised in pairs]
                    file.write(json.dumps({"input_ids": sample.tokens.tolist(), "labels": labels}) + "\n")
                    lengths.append(len(sample))
    values = {
        "parameters": model.num_parameters,
        "batch_size": train.batch_size,
        "betas": list(train.betas),
        "weight_decay": train.weight_decay,
        "grad_clip": train.grad_clip,
        "lr": [
            lr_at(
                step,
                peak=train.learning_rate or 0.0,
                warmup_steps=train.warmup_steps,
                total_steps=arguments.steps,
                schedule=train.schedule,
                min_lr_ratio=train.min_lr_ratio,
                decay_ratio=train.decay_ratio,
            )
            for step in range(1, arguments.steps + 1)
        ],
        "mean_length": sum(lengths) / len(lengths),
        "longest": max(lengths),
        "supervised_share": float(store.num_tokens.sum() / store.lengths.sum()),
    }
    (arguments.work / "inputs.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main()
