"""The objective inside transformers' Trainer and TRL's SFTTrainer: our own loop's steps, and no logits."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import rows_of
from torch.utils._python_dispatch import TorchDispatchMode

from pertoken import train
from pertoken.adapters.transformers import PerTokenLoss, fuse_loss
from pertoken.data.batch.order import step_at
from pertoken.data.tokens.tokenizer import load_tokenizer
from pertoken.errors import ModelError, RecipeError
from pertoken.folders.weights import save_folder
from pertoken.model.decoder import CausalLM
from pertoken.runs.data import prepare
from pertoken.training.evaluate import evaluate
from pertoken.training.optimizers.adamw import build_adamw
from pertoken.training.precision import Precision
from pertoken.training.schedule import lr_at

pytestmark = pytest.mark.numeric

STEPS, BATCH = 10, 8


def for_transformers(sample) -> dict[str, list[int]]:
    """All T + 1 tokens, and labels of the same positions: not shifted, -100 where nothing is supervised."""
    labels = [-100] + [int(t) if m else -100 for t, m in zip(sample.labels, sample.loss_mask, strict=True)]
    return {"input_ids": sample.tokens.tolist(), "labels": labels}


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    real = [{"real": [1] * len(row["input_ids"])} for row in rows]
    mask = torch.tensor([row["real"] + [0] * (longest - len(row["real"])) for row in real])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


@pytest.fixture(scope="module")
def ours(world, tmp_path_factory):
    """(rows, model folder, samples of the ten steps in order, held-out samples, our evaluation of the start)."""
    folder = tmp_path_factory.mktemp("ours")
    recipe = world.recipe(folder / "run", train__batch_size=BATCH, train__max_steps=STEPS, train__weight_decay=0.1)
    store, held_out = prepare(recipe)
    tokenizer = load_tokenizer(world.folder / "tokenizer")
    start = CausalLM(recipe.model.resolve(len(tokenizer)), seed=recipe.train.seed)
    save_folder(start, folder / "model", tokenizer=tokenizer, eos_token_id=tokenizer.eos_token_id)
    precision = Precision("float32", torch.device("cpu"))
    before = evaluate(start, held_out, precision, token_budget=2000)
    train(recipe)
    steps = [step_at(s, num_samples=len(store), batch_size=BATCH, seed=42).sample_ids for s in range(1, STEPS + 1)]
    samples = [for_transformers(store[int(i)]) for ids in steps for i in ids]
    return rows_of(folder / "run"), folder / "model", samples, [for_transformers(s) for s in held_out], before


def trainer_class(name: str) -> type:
    if name == "SFTTrainer":
        from trl import SFTTrainer as Base
    else:
        from transformers import Trainer as Base
    return type("Ours", (PerTokenLoss, Base), {})


def arguments(name: str, out: Path, **changes: Any) -> Any:
    from transformers import TrainingArguments
    from trl import SFTConfig

    values: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": BATCH // 2,
        "per_device_eval_batch_size": 5,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if name == "SFTTrainer":
        values |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
    return (SFTConfig if name == "SFTTrainer" else TrainingArguments)(**(values | changes))


def open_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make(name: str, ours: Any, out: Path, model: Any = None, base: type | None = None, **changes: Any) -> Any:
    from datasets import Dataset

    _, folder, samples, held_out, _ = ours
    model = model or open_model(folder)
    optimizer = build_adamw(model, weight_decay=0.1, betas=(0.9, 0.95))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: lr_at(s + 1, peak=1.0, warmup_steps=0, total_steps=STEPS)
    )
    extra = {key: changes.pop(key) for key in ("compute_loss_func", "compute_metrics") if key in changes}
    return (base or trainer_class(name))(
        model=model,
        args=arguments(name, out, **changes),
        train_dataset=Dataset.from_list(samples),
        eval_dataset=Dataset.from_list(held_out),
        data_collator=pad,
        processing_class=load_tokenizer(folder),
        optimizers=(optimizer, schedule),
        **extra,
    )


@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer"])
def test_ten_accumulated_steps_are_those_of_our_own_loop(ours, tmp_path, name):
    trainer = make(name, ours, tmp_path)
    trainer.model.get_output_embeddings().register_forward_hook(lambda *a: pytest.fail("logits were made"))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(history) == STEPS
    assert max(row["grad_norm"] for row in ours[0]) > 1.0  # so clipping matters
    for row, entry in zip(ours[0], history, strict=True):
        assert entry["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)


def test_a_plain_trainer_takes_a_fused_model_too(ours, tmp_path):
    from transformers import Trainer

    trainer = make("Trainer", ours, tmp_path, model=fuse_loss(open_model(ours[1])), base=Trainer, max_steps=3)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    for row, entry in zip(ours[0][:3], history, strict=True):
        assert entry["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)


def test_two_processes_take_the_same_steps_and_the_same_evaluation(ours, tmp_path):
    """Labels are counted over both, and one of them may have far fewer than the other.

    Transformers 5.23 leaves out DDP, so that both train on their own, where `evaluate` came first: that is refused.
    """
    code = f"""
import json, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import test_transformers as t
folder = t.Path({str(tmp_path)!r})
ours = (None, t.Path({str(ours[1])!r}), *json.loads((folder / "data.json").read_text()), None)
settings = dict(gradient_accumulation_steps=2, per_device_eval_batch_size=3, ddp_backend="gloo")
trainer = t.make("Trainer", ours, folder, **settings)
assert trainer.args.world_size == 2
trainer.train()
after = trainer.evaluate()["eval_loss"]
if trainer.args.process_index == 0:
    (folder / "found.json").write_text(json.dumps([after, trainer.state.log_history]))
other = t.make("Trainer", ours, folder, **settings)
other.evaluate()
with t.pytest.raises(t.RecipeError, match="evaluate: was called before train"):
    other.train()
t.torch.distributed.barrier()
t.torch.distributed.destroy_process_group()
"""
    (tmp_path / "data.json").write_text(json.dumps([ours[2], ours[3]]))
    (tmp_path / "script.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run([*command, tmp_path / "script.py"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    after, history = json.loads((tmp_path / "found.json").read_text())
    for row, entry in zip(ours[0], [entry for entry in history if "grad_norm" in entry], strict=True):
        assert entry["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-5)
    assert after == pytest.approx(ours[0][-1]["eval_loss"], rel=1e-5)  # 12 samples: two batches of three for each


@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer"])
def test_evaluation_is_one_mean_over_all_tokens_not_a_mean_of_batch_means(ours, tmp_path, name):
    assert make(name, ours, tmp_path).evaluate()["eval_loss"] == pytest.approx(ours[4].loss, rel=1e-6)
    base = trainer_class(name).__mro__[2]
    theirs = make(name, ours, tmp_path, base=base).evaluate()["eval_loss"]
    assert abs(theirs - ours[4].loss) > 1e-4 * ours[4].loss


@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer"])
def test_what_needs_logits_has_them(ours, tmp_path, name):
    seen = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"count": 1.0}

    trainer = make(name, ours, tmp_path, compute_metrics=compute_metrics, eval_do_concat_batches=True)
    metrics = trainer.evaluate(trainer.eval_dataset.select(range(5)))
    assert metrics["eval_count"] == 1.0
    assert seen[0][::2] == (5, trainer.model.config.vocab_size)
    predicted = trainer.predict(trainer.eval_dataset.select(range(5)))
    assert predicted.predictions.shape == seen[0]
    assert predicted.metrics["test_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


SETTINGS = {
    "label_smoothing_factor=0.1": ("Trainer", {"label_smoothing_factor": 0.1}),
    "compute_loss_func": ("Trainer", {"compute_loss_func": lambda *a, **k: None}),
    'loss_type="dft"': ("SFTTrainer", {"loss_type": "dft"}),
}


@pytest.mark.parametrize("message", SETTINGS)
def test_settings_that_mean_another_loss_are_refused(ours, tmp_path, message):
    name, changes = SETTINGS[message]
    with pytest.raises(RecipeError, match=re.escape(message)):
        make(name, ours, tmp_path, **changes)


def test_a_trainer_with_a_loss_of_its_own_is_refused_not_overruled(ours, tmp_path):
    from transformers import Trainer

    class Distilling(Trainer):
        def compute_loss(self, *args, **kwargs):
            raise NotImplementedError

    with pytest.raises(RecipeError, match=r"Distilling\.compute_loss: is a loss of its own"):
        make("Trainer", ours, tmp_path, base=type("Ours", (PerTokenLoss, Distilling), {}))


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 97,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def tiny(name: str, **keys: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**(GPT2 if name == "GPT2" else SIZES), "vocab_size": 97, **keys})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model if name == "Mixtral" else model.double()  # its experts' kernel has no float64


def batch() -> dict[str, torch.Tensor]:
    """Three right-padded rows; the first token of one is marked as supervised, though no position predicts it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(97, (3, 12), generator=generator)
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3]])).long()
    labels = torch.where((torch.rand(3, 12, generator=generator) < 0.6) & mask.bool(), ids, -100)
    labels[0, 0] = ids[0, 0]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


CALLS: dict[str, Any] = {
    "own mean": lambda model, b: model(**b),
    "count as a tensor": lambda model, b: model(**b, num_items_in_batch=torch.tensor(40)),
    "count as an int": lambda model, b: model(**b, num_items_in_batch=40),
    "by position": lambda model, b: model(b["input_ids"], attention_mask=b["attention_mask"], labels=b["labels"]),
    "shifted already": lambda model, b: model(**b, shift_labels=F.pad(b["labels"][:, 1:], (0, 1), value=-100)),
    "embeddings": lambda model, b: model(
        inputs_embeds=model.get_input_embeddings()(b["input_ids"]).detach(), labels=b["labels"]
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT2", "Gemma", "Gemma2", "Cohere", "Mixtral"])
def test_loss_and_gradients_are_transformers_own_without_logits(name, call):
    model = tiny(name)
    fused = fuse_loss(copy.deepcopy(model))
    expected, found = CALLS[call](model, batch()), CALLS[call](fused, batch())
    assert found.logits is None
    bound = 1e-5 if name == "Mixtral" else 1e-6  # transformers computes its loss in float32, whatever the model's type
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=bound)
    expected.loss.backward()
    found.loss.backward()
    for (key, a), b in zip(model.named_parameters(), fused.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            assert (a.grad - b.grad).abs().max() <= bound * a.grad.abs().max(), key


def test_without_a_supervised_token_loss_and_gradients_are_zero():
    model = fuse_loss(tiny("Llama"))
    loss = model(**{**batch(), "labels": torch.full((3, 12), -100)}).loss
    assert loss.item() == 0.0
    loss.backward()
    assert not any(p.grad.any() for p in model.parameters())


def test_without_labels_nothing_changes_and_a_copy_is_its_own():
    plain, fused = tiny("Llama"), fuse_loss(tiny("Llama"))
    ids = batch()["input_ids"][:1, :5]
    assert torch.equal(fused(ids).logits, plain(ids).logits)
    both = [
        m.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids)) for m in (plain, fused)
    ]
    assert torch.equal(*both)
    assert torch.equal(fused(**batch(), with_logits=True).logits, plain(**batch()).logits)
    copied = copy.deepcopy(fused)
    with torch.no_grad():
        copied.get_output_embeddings().weight.zero_()
    assert copied(**batch()).loss.item() == pytest.approx(torch.tensor(97.0).log().item())
    assert fused(**batch()).loss.item() != copied(**batch()).loss.item()


REFUSED = {
    "Phi": ({}, "its head has a bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_logits_that_are_more_than_the_heads_product_are_refused(name):
    keys, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        fuse_loss(tiny(name, **keys))


def test_a_balance_loss_is_refused_never_left_out():
    with pytest.raises(ModelError, match="output_router_logits=True"):
        fuse_loss(tiny("Mixtral", output_router_logits=True))(**batch())
    with pytest.raises(ModelError, match="output_router_logits=True"):
        fuse_loss(tiny("Mixtral"))(**batch(), output_router_logits=True)


def test_sft_trainer_must_be_told_to_leave_the_balance_loss_out(ours, tmp_path):
    model = tiny("Mixtral", vocab_size=26)
    with pytest.raises(RecipeError, match=r"router_aux_loss_coef=0\.001"):
        make("SFTTrainer", ours, tmp_path, model=model)
    trainer = make("SFTTrainer", ours, tmp_path, model=model, router_aux_loss_coef=0.0, max_steps=1)
    trainer.train()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_no_tensor_is_as_large_as_the_logits():
    vocab, rows, length = 50_000, 4, 300
    ids = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    found = {}
    for fused in (False, True):
        model = tiny("Llama", vocab_size=vocab).float()
        if fused:
            fuse_loss(model)
        with Largest() as largest:
            model(input_ids=ids, labels=ids).loss.backward()
        found[fused] = largest.elements
    assert found[False] == rows * length * vocab
    assert found[True] <= 0.5 * found[False]  # one chunk of 512 rows, or the head itself


def test_the_process_needs_less_than_the_logits_where_transformers_needs_them_twice():
    """Peak memory that a pass adds, as the system counts it: first a pass of ours, then one of the model's own."""
    code = """
import resource, torch, transformers
from pathlib import Path
from pertoken.adapters.transformers import fuse_loss

def peak_bytes():
    status = Path("/proc/self/status")  # Linux's ru_maxrss begins at what the parent process had
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model = fuse_loss(transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes, vocab_size=64000)))
ids = torch.randint(64000, (4, 512), generator=torch.Generator().manual_seed(0))
before = peak_bytes()
for with_logits in (False, True):
    model(input_ids=ids, labels=ids, with_logits=with_logits).loss.backward()
    print(peak_bytes() - before)
"""
    logits_bytes = 4 * 512 * 64000 * 4
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, theirs = map(int, result.stdout.split())
    assert ours < logits_bytes, (ours, theirs)
    assert theirs > 2 * logits_bytes, (ours, theirs)


# TRL's own default, under the name that transformers has just deprecated
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
# Trainer pins memory by default, which is for GPUs; the example leaves it so
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_code_in_the_documentation_runs(world, ours, tmp_path, monkeypatch):
    import datasets

    text = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "model").symlink_to(ours[1])
    (tmp_path / "chats.jsonl").symlink_to(world.folder / "chats.jsonl")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["trainer"].state.global_step == 13
    assert names["loss"].grad_fn is not None
