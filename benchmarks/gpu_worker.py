"""One workload of gpu.py, all its contenders one after the other in this process: a line of JSON for each.

    python benchmarks/gpu_worker.py WORKLOAD [--contenders NAME ...] [--warm-up 10] [--steps 20] [--device cuda]

Samples are random tokens. Their lengths are drawn from the quantiles of GSM8K's (MiniMind's tokenizer, cut at 512), of
which the last 57% are supervised; or all are equally long and supervised. Everyone begins with the same weights and
takes the same samples in the same order, with fused AdamW at one learning rate and a clipped norm, in bfloat16 by
autocast. With CUDA graphs all steps are taken twice before, so that every shape is recorded, and losses are those after
that. Time is that of all measured steps together, from one wait for the GPU to the next. With `--wait` it imports
what it needs, says so, and begins when it reads a line; with `--profile FILE` it adds what the GPU computes meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pertoken.data.batch.order import step_at
from pertoken.data.batch.sample import Sample
from pertoken.engines.choice import Choice
from pertoken.engines.choose import choose_engine
from pertoken.engines.cuda_graphs import graphs_for
from pertoken.folders.adapters import adapt
from pertoken.folders.config import config_to_hf
from pertoken.model.decoder import CausalLM
from pertoken.model.lora import Base, keep_frozen_in
from pertoken.model.operations import attention_operations, body_parameters
from pertoken.objective.choose import objective_of
from pertoken.prove.samples import InMemory
from pertoken.recipe.adapter import AdapterConfig
from pertoken.recipe.model import ModelConfig, ResolvedModelConfig
from pertoken.recipe.schema import Recipe
from pertoken.runs.computation import Computation, samples_of, update
from pertoken.tracking.reporter import Reporter
from pertoken.training.optimizers import build_optimizer
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState

SEED, LR, BETAS, DECAY, CLIP = 42, 1e-4, (0.9, 0.95), 0.1, 1.0
QUANTILES = (83, 139, 158, 176, 193, 210, 231, 255, 286, 331, 512)  # of GSM8K's lengths, from the least to the greatest
SUPERVISED = 0.57
LORA = AdapterConfig(kind="lora", r=16, alpha=32.0)

MINIMIND = {"family": "llama", "hidden_size": 512, "num_hidden_layers": 8, "num_key_value_heads": 2}
THIRTY = {"family": "qwen3", "hidden_size": 512, "num_hidden_layers": 8, "num_key_value_heads": 4}
SMOLLM2 = {"family": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9}
SMOLLM2 |= {"num_key_value_heads": 3, "intermediate_size": 1536}
QWEN3 = {"family": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN3 |= {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072}
TINY = {"family": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Workload:
    """A model's shape, a batch, and what of the model is trained."""

    model: dict[str, Any]
    vocab_size: int
    batch_size: int
    length: int | None = None  # of every sample; None: GSM8K's lengths
    lora: bool = False
    micro_batch_tokens: int = 8192

    @property
    def config(self) -> ResolvedModelConfig:
        return ModelConfig(**self.model, max_position_embeddings=1024).resolve(self.vocab_size)


WORKLOADS = {
    "26M": Workload(MINIMIND | {"intermediate_size": 1408}, 6400, 16, length=340),
    "30M": Workload(THIRTY | {"intermediate_size": 1664}, 6400, 16),
    "135M": Workload(SMOLLM2, 49152, 32),
    "0.6B": Workload(QWEN3, 151936, 16),
    "135M LoRA": Workload(SMOLLM2, 49152, 8, lora=True),
    "0.6B LoRA": Workload(QWEN3, 151936, 16, lora=True),
    "tiny": Workload(TINY, 512, 4),  # to see that the script runs
    "tiny LoRA": Workload(TINY, 512, 4, lora=True),
}


def samples_for(work: Workload, count: int) -> InMemory:
    rng = np.random.default_rng(SEED)
    drawn = np.interp(rng.random(count), np.linspace(0, 1, len(QUANTILES)), QUANTILES).astype(int)
    samples = []
    for n in drawn if work.length is None else np.full(count, work.length):
        share = 1.0 if work.length is not None else SUPERVISED
        mask = np.arange(n) >= round(n * (1 - share))
        samples.append(Sample(rng.integers(0, work.vocab_size, n + 1), mask))
    return InMemory(samples)


def new_model(work: Workload, device: torch.device) -> CausalLM:
    """The same weights whenever it is called, made on the device."""
    model = CausalLM(work.config, device="meta").to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def operations(work: Workload, lengths: list[int], supervised: int) -> float:
    """Useful ones of a step: no padding, no logits that nobody supervises, no gradients of frozen weights."""
    config = work.config
    dense = body_parameters(config) * sum(lengths) + config.vocab_size * config.hidden_size * supervised
    return (4.0 if work.lora else 6.0) * dense + attention_operations(config, sum(n * n for n in lengths))


class Steps:
    """The steps' samples, alike for all contenders; the clock of one of them."""

    def __init__(self, work: Workload, options: argparse.Namespace) -> None:
        self.work, self.warm_up, self.count = work, options.warm_up, options.warm_up + options.steps
        self.device = torch.device(options.device)
        self.samples = samples_for(work, work.batch_size * self.count)
        self.losses: list[float | torch.Tensor] = []
        self._began = self._ended = 0.0

    def of(self, step: int) -> np.ndarray:
        """Sample ids of a step, from 1."""
        batch = self.work.batch_size
        return step_at(step, num_samples=len(self.samples), batch_size=batch, seed=SEED).sample_ids

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def done(self, step: int) -> None:
        """Told after each step."""
        if step == self.warm_up:
            self.wait()
            self._began = time.perf_counter()
        if step == self.count:
            self.wait()
            self._ended = time.perf_counter()

    def figures(self) -> dict[str, Any]:
        ids = [self.of(step) for step in range(self.warm_up + 1, self.count + 1)]
        seconds = self._ended - self._began
        lengths = [int(n) for i in ids for n in self.samples.lengths[i]]
        supervised = int(sum(self.samples.num_tokens[i].sum() for i in ids))
        losses = [float(x) for x in self.losses]
        return {
            "step_ms": 1e3 * seconds / len(ids),
            "samples_per_s": len(lengths) / seconds,
            "tokens_per_s": sum(lengths) / seconds,
            "tflops": operations(self.work, lengths, supervised) / seconds / 1e12,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
        }


def pertoken(
    steps: Steps,
    engine: str,
    *,
    low_base: bool = False,
    loss_impl: str = "auto",
    checkpointing: bool = False,
    graphs: bool = False,
) -> Callable[[int], None]:
    work, device = steps.work, steps.device
    keys = {"dtype": "bfloat16", "learning_rate": LR, "weight_decay": DECAY, "betas": BETAS, "grad_clip": CLIP}
    keys |= {"schedule": "constant", "batch_size": work.batch_size, "seed": SEED}
    keys |= {"micro_batch_tokens": work.micro_batch_tokens}
    data = {"path": "none.jsonl", "tokenizer": "none"}
    recipe = Recipe.parse({"stage": "sft", "out_dir": "none", "model": work.model, "data": data, "train": keys})
    model = new_model(work, device)
    if work.lora:
        adapt(model, LORA, Base("base"), seed=SEED)
        if low_base:
            keep_frozen_in(torch.bfloat16, model.layers)
    precision = Precision("bfloat16", device)
    choice: Choice = choose_engine(model, engine, dtype="bfloat16", device=device, total_steps=steps.count)
    execution = replace(choice.execution, activation_checkpointing=checkpointing)
    if loss_impl != "auto":
        execution = replace(execution, loss_impl=loss_impl)  # type: ignore[arg-type]
    state = TrainState(
        model,
        build_optimizer(model, recipe.train),
        precision.new_scaler(),
        precision,
        objective=objective_of(recipe.train),
        kernels=choice.kernels("bfloat16", device),
        execution=execution,
    )
    if graphs:
        state.graphs = graphs_for(model, state.objective, device, execution, precision.autocast)
    budget = recipe.train.micro_batch_tokens
    computation = Computation(recipe, model, state, steps.samples, steps.count, budget, Reporter())  # type: ignore[arg-type]

    def step(number: int) -> None:
        row = update(computation, samples_of(computation, number), skips=lambda norm: False, lr=LR)
        steps.losses.append(row.loss)

    return step


def their_model(steps: Steps, *, low_base: bool = False) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config_to_hf(steps.work.config)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config.use_cache = False
    dtype = torch.bfloat16 if low_base and steps.work.lora else torch.float32
    with steps.device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    ours = new_model(steps.work, steps.device)
    state = model.state_dict()
    for name, value in ours.state_dict().items():
        state[name].copy_(value)
    model.tie_weights()
    model.train()
    if not steps.work.lora:
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=LORA.r, lora_alpha=int(LORA.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=True)


def their_optimizer(model: Any) -> torch.optim.Optimizer:
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim >= 2], "weight_decay": DECAY},
        {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, betas=BETAS, fused=True)


def padded_loop(steps: Steps, *, low_base: bool = False) -> Callable[[int], None]:
    """What a Trainer does, without a Trainer: rows padded on the right to the batch's longest, all logits."""
    model = their_model(steps, low_base=low_base)
    optimizer = their_optimizer(model)

    def step(number: int) -> None:
        samples = [steps.samples[int(i)] for i in steps.of(number)]
        width = max(map(len, samples))
        inputs = torch.zeros(len(samples), width, dtype=torch.int64)
        labels = torch.full((len(samples), width), -100, dtype=torch.int64)
        mask = torch.zeros(len(samples), width, dtype=torch.int64)
        for i, sample in enumerate(samples):
            n = len(sample)
            inputs[i, :n], mask[i, :n] = torch.from_numpy(sample.input_ids.copy()), 1
            labels[i, :n] = torch.from_numpy(np.where(sample.loss_mask, sample.labels, -100))
        inputs, labels, mask = (x.to(steps.device, non_blocking=True) for x in (inputs, labels, mask))
        with torch.autocast(steps.device.type, torch.bfloat16):
            logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.losses.append(loss.detach())

    return step


def trl(steps: Steps, *, liger: bool, low_base: bool = False) -> None:
    """All steps: SFTTrainer has a loop of its own."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = []
    for step in range(1, steps.count + 1):
        for i in steps.of(step):
            sample = steps.samples[int(i)]
            labels = [-100, *np.where(sample.loss_mask, sample.labels, -100).tolist()]
            rows.append({"input_ids": sample.tokens.tolist(), "labels": labels})
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(steps.work.vocab_size)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **keys: Any) -> None:
            steps.done(state.global_step)

    model = their_model(steps, low_base=low_base)
    optimizer = their_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    settings: dict[str, Any] = {
        "output_dir": str(Path(__file__).parent / "scratch" / "gpu-trl"),
        "max_steps": steps.count,
        "per_device_train_batch_size": steps.work.batch_size,
        "max_grad_norm": CLIP,
        "max_length": None,
        "train_sampling_strategy": "sequential",
        "use_cpu": steps.device.type == "cpu",
        "bf16": True,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_liger_kernel": liger,
    }
    known = SFTConfig.__dataclass_fields__
    settings |= {"activation_checkpointing": False} if "activation_checkpointing" in known else {}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{key: value for key, value in settings.items() if key in known}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, schedule),
        callbacks=[Clock()],
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()


# Of full fine-tuning and of LoRA; names as they are in the table.
FULL: dict[str, Callable[[Steps], Callable[[int], None] | None]] = {
    "pertoken": lambda steps: pertoken(steps, "plain"),
    "pertoken, compiled": lambda steps: pertoken(steps, "compile"),
    "pertoken, graphs": lambda steps: pertoken(steps, "plain", graphs=True),
    "pertoken, compiled, graphs": lambda steps: pertoken(steps, "compile", graphs=True),
    "pertoken, compiled, Liger head": lambda steps: pertoken(steps, "compile", loss_impl="liger"),
    "transformers, padded": padded_loop,
    "TRL": lambda steps: trl(steps, liger=False),
    "TRL, Liger": lambda steps: trl(steps, liger=True),
}
ADAPTER: dict[str, Callable[[Steps], Callable[[int], None] | None]] = {
    "pertoken": lambda steps: pertoken(steps, "plain"),
    "pertoken, bf16 base": lambda steps: pertoken(steps, "plain", low_base=True),
    "pertoken, bf16 base, compiled": lambda steps: pertoken(steps, "compile", low_base=True),
    "pertoken, bf16 base, graphs": lambda steps: pertoken(steps, "plain", low_base=True, graphs=True),
    "pertoken, bf16 base, compiled, graphs": lambda steps: pertoken(steps, "compile", low_base=True, graphs=True),
    "transformers + peft, bf16 base, padded": lambda steps: padded_loop(steps, low_base=True),
    "TRL + peft": lambda steps: trl(steps, liger=False),
    "TRL + peft, bf16 base": lambda steps: trl(steps, liger=False, low_base=True),
    "TRL + peft, bf16 base, Liger": lambda steps: trl(steps, liger=True, low_base=True),
}


def run(name: str, contender: Callable[[Steps], Callable[[int], None] | None], steps: Steps) -> dict[str, Any]:
    cuda = steps.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    began = time.perf_counter()
    step = contender(steps)
    if step is not None:
        # A shape is recorded when it comes for the second time, which a run of some length does once.
        for number in (*range(1, steps.count + 1),) * (2 if "graphs" in name else 0):
            step(number)
        steps.losses.clear()
        for number in range(1, steps.count + 1):
            step(number)
            steps.done(number)
    found = {"contender": name, **steps.figures(), "took_s": time.perf_counter() - began}
    if cuda:
        found |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9, "before_gb": before / 1e9}
    return found


def profile(steps: Steps, contender: Callable[[Steps], Callable[[int], None] | None], file: Path, name: str) -> None:
    """What the GPU computes in three steps, appended to `file`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    step = contender(steps)
    assert step is not None
    for number in range(1, 6):
        step(number)
    steps.wait()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if steps.device.type == "cuda" else [])]
    began = time.perf_counter()
    with recording(activities=activities) as recorded:
        for number in range(6, 9):
            step(number)
        steps.wait()
    wall = time.perf_counter() - began
    order = "self_cuda_time_total" if steps.device.type == "cuda" else "self_cpu_time_total"
    averages = recorded.key_averages()
    busy = sum(getattr(e, "self_device_time_total", 0.0) for e in averages) / 1e6
    launches = sum(e.count for e in averages if e.key in ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx"))
    with file.open("a") as out:
        out.write(f"\n## {name}: 3 steps, {wall * 1e3:.1f} ms, kernels {busy * 1e3:.1f} ms, {launches} launches\n")
        out.write(averages.table(sort_by=order, row_limit=25, max_name_column_width=70))


def matrix_rate(device: torch.device) -> dict[str, Any]:
    """TFLOP/s of a bfloat16 product of 8192 x 8192 random matrices: the mean of 20 after 5."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    if device.type == "cuda":
        torch.cuda.synchronize()
    rate = 20 * 2 * size**3 / (time.perf_counter() - began) / 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"gpu": name, "torch": torch.__version__, "matrix_tflops": rate}


def release(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--contenders", nargs="+", help="names as in the table; all if left out")
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--profile", type=Path)
    options = parser.parse_args()
    work = WORKLOADS[options.workload]
    contenders = ADAPTER if work.lora else FULL
    device = torch.device(options.device)
    if options.wait:
        import transformers  # noqa: F401

        with contextlib.suppress(ImportError):
            import trl  # noqa: F401
        print("ready", flush=True)
        sys.stdin.readline()
    print(json.dumps(matrix_rate(device)), flush=True)
    for name in options.contenders or contenders:
        release(device.type == "cuda")
        try:
            found = run(name, contenders[name], Steps(work, options))
        except Exception as error:
            found = {"contender": name, "failed": f"{type(error).__name__}: {error}"[:600]}
        print(json.dumps({"workload": options.workload, **found}), flush=True)
        if options.profile is not None and name.startswith("pertoken") and "failed" not in found:
            release(device.type == "cuda")
            try:
                profile(Steps(work, options), contenders[name], options.profile, f"{options.workload}: {name}")
            except Exception as error:
                print(f"no profile: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
