"""A model that cannot fit is refused before it is built; memory that ends costs smaller micro-batches, not the run."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tiny import pertoken, rows_of

from pertoken import Recipe, train
from pertoken.checkpoints import snapshot as saving
from pertoken.data.batch.pack import collate
from pertoken.data.batch.sample import Sample
from pertoken.errors import CheckpointError, PertokenError, RecipeError
from pertoken.inference.generate import generate
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig
from pertoken.runs import computation
from pertoken.tracking.listener import Listener
from pertoken.training import memory, step
from pertoken.training.memory import machine_bytes, out_of_memory, training_bytes

ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4194304000 bytes. Error code 12 (Cannot allocate memory)"
)
ENDS = {
    "torch": ALLOCATOR,
    "C++": RuntimeError("std::bad_alloc"),
    "Python": MemoryError(),
    "a mapping": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "CUDA": torch.OutOfMemoryError("CUDA out of memory"),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 2},
        {"family": "llama", "head_dim": 6},
        {"family": "qwen2", "num_key_value_heads": 2},
        {"family": "olmo2", "num_key_value_heads": 2},
        {"family": "gemma3", "num_key_value_heads": 2},
        {"use_moe": True, "num_experts": 3, "moe_intermediate_size": 20},
        {"use_moe": True, "family": "llama", "tie_word_embeddings": False},
        {"use_moe": True, "family": "qwen2", "shared_expert_intermediate_size": 20},
    ],
)
def test_the_number_of_parameters_by_arithmetic_is_that_of_the_model(changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    config = ModelConfig.model_validate(sizes | changes).resolve(50)
    assert config.num_parameters == sum(p.numel() for p in CausalLM(config, device="meta").parameters())


ABSURD = {
    "hidden_size": "model.hidden_size=1000000000000",
    "vocab_size": "model.vocab_size=1000000000000",
    "intermediate_size": "model.intermediate_size=1000000000000",
    "num_hidden_layers": "model.num_hidden_layers=100000000",
    "num_attention_heads": "model.num_attention_heads=1000000000",
    "head_dim": "model.head_dim=1000000000000",
    "num_experts": "model.num_experts=1000000000",
    "moe_intermediate_size": "model.moe_intermediate_size=1000000000000",
    "the largest number": f"model.hidden_size={2**62}",
}


@pytest.mark.parametrize("name", ABSURD)
def test_a_model_that_no_memory_holds_is_refused_with_figures_before_the_data_is_read(world, tmp_path, name):
    recipe = world.write_recipe(tmp_path / "run", data__path=str(tmp_path / "not there yet.jsonl"))
    more = ["model.use_moe=true"] if "expert" in name or "moe" in name else []
    more += ["model.head_dim=8"] if name == "num_attention_heads" else []
    start = time.monotonic()
    code, _, err = pertoken("train", recipe, ABSURD[name], *more)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert ("GB" in err and "[model]" in err) or "cannot be meant; lower it" in err, err
    assert time.monotonic() - start < 30
    assert not (tmp_path / "run").exists()


def test_what_training_takes_is_compared_with_what_the_machine_has(world, monkeypatch, tmp_path):
    """Weights, gradients and AdamW's two moments in float32 are 16 bytes a parameter; Muon has one moment."""
    recipe = world.recipe(tmp_path / "run")
    needed = 16 * recipe.model.resolve(100).num_parameters
    monkeypatch.setattr(memory, "machine_bytes", lambda: needed)
    memory.check_size(recipe, 100)
    monkeypatch.setattr(memory, "machine_bytes", lambda: needed - 1)
    with pytest.raises(RecipeError, match="parameters; training them takes at least"):
        memory.check_size(recipe, 100)
    memory.check_size(world.recipe(tmp_path / "run", train__optimizer="muon"), 100)
    with pytest.raises(RecipeError, match="takes at least"):
        memory.check_size(world.recipe(tmp_path / "run", train__optimizer="muon", train__dtype="float64"), 100)


def test_the_machines_memory_is_no_more_than_ulimit_allows():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))\n"
        "from pertoken.training.memory import machine_bytes; print(machine_bytes() <= 2**36)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "True"
    assert machine_bytes() is None or machine_bytes() > 2**28


@pytest.mark.parametrize("kind", ENDS)
def test_all_ways_that_memory_ends_are_known(kind):
    assert out_of_memory(ENDS[kind])
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert not out_of_memory(OSError(errno.ENOSPC, "No space left on device"))


class Told(Listener):
    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


def failing_above(monkeypatch, most_tokens: int, error: Exception) -> None:
    """The model's forward pass has memory for micro-batches of so many tokens, in training and evaluation."""
    real = CausalLM.forward

    def forward(self, micro_batch, *args, **kwargs):
        if micro_batch.input_ids.shape[0] > most_tokens:
            raise error
        return real(self, micro_batch, *args, **kwargs)

    monkeypatch.setattr(CausalLM, "forward", forward)


@pytest.mark.parametrize("kind", ["torch", "Python", "a mapping"])
def test_where_memory_ends_on_a_cpu_micro_batches_are_halved_and_the_run_is_the_same(
    world, tmp_path, monkeypatch, kind
):
    failing_above(monkeypatch, 1500, ENDS[kind])
    told = Told()
    settings = {"train__max_steps": 3, "train__engine": "plain", "train__dtype": "float64"}
    train(world.recipe(tmp_path / "run", **settings), listener=told)
    assert any("out of memory; train.micro_batch_tokens halved to" in line for line in told.messages)
    monkeypatch.undo()
    train(world.recipe(tmp_path / "free", **settings))
    for row, other in zip(rows_of(tmp_path / "run"), rows_of(tmp_path / "free"), strict=True):
        assert row["loss_sum"] == pytest.approx(other["loss_sum"], rel=1e-12)
        assert row.get("eval_loss") == (other.get("eval_loss") and pytest.approx(other["eval_loss"], rel=1e-12))


@pytest.mark.parametrize("kind", ["torch", "CUDA"])
def test_where_one_sample_is_too_many_a_line_says_what_to_change(world, tmp_path, monkeypatch, kind):
    failing_above(monkeypatch, 5, ENDS[kind])
    with pytest.raises(PertokenError, match=r"step 1: out of memory with one sample .* lower data.max_seq_len"):
        train(world.recipe(tmp_path / "run", train__max_steps=3, train__engine="plain"))


def test_evaluation_that_memory_ends_in_is_halved_too(world, tmp_path, monkeypatch):
    recipe = world.write_recipe(tmp_path / "run", train__max_steps=1, train__dtype="float64")
    assert pertoken("train", recipe)[0] == 0
    held_out = world.folder / "held-out.jsonl"
    code, whole, _ = pertoken("eval", tmp_path / "run", held_out, "--dtype", "float64")
    assert code == 0
    failing_above(monkeypatch, 600, ALLOCATOR)
    code, halved, err = pertoken("eval", tmp_path / "run", held_out, "--dtype", "float64")
    assert (code, halved) == (0, whole), err
    failing_above(monkeypatch, 3, ALLOCATOR)
    code, _, err = pertoken("eval", tmp_path / "run", held_out, "--dtype", "float64")
    assert code == 2
    assert "evaluation: out of memory" in err


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory_that_ends_in_the_gradients_norm_costs_no_step_and_unscales_once(world, tmp_path, monkeypatch, dtype):
    """float16's gradients were divided by the loss scale already, and the scaler does that once an update."""
    settings = {"train__max_steps": 3, "train__engine": "plain", "train__dtype": dtype, "data__eval_path": []}
    train(world.recipe(tmp_path / "free", **settings))
    real, calls = step.total_norm, []

    def total_norm(*args):
        calls.append(1)
        if len(calls) == 2:
            raise ALLOCATOR
        return real(*args)

    monkeypatch.setattr(step, "total_norm", total_norm)
    told = Told()
    train(world.recipe(tmp_path / "run", **settings), listener=told)
    assert any(line.startswith("step 2: out of memory") for line in told.messages)
    for row, other in zip(rows_of(tmp_path / "run"), rows_of(tmp_path / "free"), strict=True):
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3 if dtype == "float16" else 1e-5)
        assert row.get("loss_scale") == other.get("loss_scale")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_memory_that_ends_in_the_update_itself_does_not_update_twice(world, tmp_path, monkeypatch, optimizer):
    """Some weights have changed by then, so the step is not done again."""
    recipe = world.recipe(
        tmp_path / "run",
        train__max_steps=3,
        train__optimizer=optimizer,
        checkpoint__save_interval=1,
        data__eval_path=[],
    )
    real, calls = computation.train_step, []

    def train_step(state, *args, **kwargs):
        result = real(state, *args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            raise ALLOCATOR
        return result

    monkeypatch.setattr(computation, "train_step", train_step)
    with pytest.raises(PertokenError, match=r"step 2: out of memory while the weights were updated"):
        train(recipe)
    monkeypatch.undo()
    train(recipe, resume=True)
    whole = tmp_path / "whole"
    train(recipe.model_copy(update={"out_dir": str(whole)}))
    digests = [
        hashlib.sha256((run / "checkpoints" / "step-00000003" / "model.safetensors").read_bytes()).hexdigest()
        for run in (tmp_path / "run", whole)
    ]
    assert digests[0] == digests[1]


def test_other_errors_keep_their_traceback(world, tmp_path, monkeypatch):
    failing_above(monkeypatch, 5, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        train(world.recipe(tmp_path / "run", train__max_steps=3, train__engine="plain"))


def test_a_run_that_the_system_gives_too_little_memory_ends_well_or_in_one_line(world, tmp_path):
    """`ulimit -v`, set where the data and the model are ready: what is then asked for is not there."""
    recipe = world.write_recipe(
        tmp_path / "run", train__max_steps=1, train__engine="plain", data__eval_path=[], train__batch_size=101,
        train__micro_batch_tokens=10**6, model__vocab_size=200_000, model__tie_word_embeddings=False,
    )  # fmt: skip
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from pertoken.runs import loop\n"
        "from pertoken.cli.commands import main\n"
        "real = loop.update\n"
        "def update(*args, **kwargs):\n"
        "    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 2**25, resource.RLIM_INFINITY))\n"
        "    return real(*args, **kwargs)\n"
        "loop.update = update\n"
        f"sys.argv = ['pertoken', 'train', {str(recipe)!r}]\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "Traceback" not in ended.stderr, ended.stderr
    assert "out of memory" in ended.stdout + ended.stderr
    assert ended.returncode in (0, 2)


def test_a_model_to_start_from_is_compared_with_the_machine_before_it_is_loaded(world, tmp_path, monkeypatch):
    assert pertoken("train", world.write_recipe(tmp_path / "run", train__max_steps=1))[0] == 0
    recipe = world.write_recipe(tmp_path / "tuned", init_from=str(tmp_path / "run"), train__max_steps=1)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 10_000)
    code, _, err = pertoken("train", recipe)
    assert code == 2
    assert f"init_from={tmp_path / 'run'}: " in err
    assert "parameters; training them takes at least" in err


def test_a_copy_that_there_is_no_memory_for_is_a_save_that_failed_not_a_run(world, tmp_path, monkeypatch):
    real = saving._on_host

    def on_host(tensor, *, copy):
        if copy:
            raise ALLOCATOR
        return real(tensor, copy=copy)

    monkeypatch.setattr(saving, "_on_host", on_host)
    told = Told()
    train(world.recipe(tmp_path / "run", train__max_steps=3, checkpoint__save_interval=1), listener=told)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*step-*")] == ["step-00000003"]
    assert "out of memory for a copy); set checkpoint.async_save=false" in told.messages[0]


@pytest.mark.parametrize("kind", ["Python", "a mapping"])
def test_memory_that_ends_while_a_checkpoint_is_written_costs_that_save_not_the_run(world, tmp_path, monkeypatch, kind):
    real, calls = saving.save_folder, []

    def save_folder(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise ENDS[kind]
        return real(*args, **kwargs)

    monkeypatch.setattr(saving, "save_folder", save_folder)
    told = Told()
    train(world.recipe(tmp_path / "run", train__max_steps=3, checkpoint__save_interval=1), listener=told)
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert any("could not be saved (out of memory); free memory; training continues" in line for line in told.messages)


def test_a_copy_to_the_host_that_no_setting_would_spare_names_another_remedy(world, tmp_path, monkeypatch):
    def on_host(tensor, *, copy):
        raise ALLOCATOR

    monkeypatch.setattr(saving, "_on_host", on_host)
    with pytest.raises(CheckpointError, match="out of memory for a copy") as caught:
        train(world.recipe(tmp_path / "run", train__max_steps=1))
    assert "async_save" not in str(caught.value)


def test_a_cache_that_there_is_no_memory_for_is_one_line(world, monkeypatch):
    config = ModelConfig.model_validate({"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1})
    model = CausalLM(config.resolve(20))

    def new_cache(length):
        raise ALLOCATOR

    monkeypatch.setattr(model, "new_cache", new_cache)
    with pytest.raises(RecipeError, match="max_new_tokens=99: no memory for 101 tokens"):
        list(generate(model, [1, 2], max_new_tokens=99))


def test_a_vocabulary_beyond_any_memory_is_refused(world, tmp_path):
    chats = world.folder / "chats.jsonl"
    code, _, err = pertoken("tokenizer", "train", chats, "--vocab-size", 10**12, "--out", tmp_path / "t")
    assert code == 2
    assert "vocab_size=1000000000000: there can be 16,777,216 tokens at most" in err


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "bfloat16"), ("llama", "bfloat16"), ("qwen2", "float32")])
def test_the_activations_that_an_estimate_has_are_those_that_plain_modules_keep(family: str, dtype: str) -> None:
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = {"family": family, **sizes, "intermediate_size": 350, "vocab_size": 100, "max_position_embeddings": 512}
    recipe = Recipe.parse(
        {
            "stage": "sft",
            "out_dir": "run",
            "model": model,
            "data": {"path": "a", "tokenizer": "t", "max_seq_len": 512},
            "train": {"dtype": dtype, "micro_batch_tokens": 1200},
        }
    )
    config = recipe.model.resolve(100)
    decoder, kept = CausalLM(config), dict[int, torch.Tensor]()
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(0, 100, 301).astype(np.int32), np.ones(300, np.bool_)) for _ in range(4)]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        decoder.hidden_states(collate(samples))
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    logits = 512 * 100 * (4 + (2 if dtype == "bfloat16" else 4))
    needed = training_bytes(recipe, config)
    assert 0.65 < (needed["activations"] - logits) / measured < 1.35
    numbers = sum(parameter.numel() for parameter in decoder.parameters())
    assert (needed["weights"], needed["gradients"], needed["optimizer"]) == (4 * numbers, 4 * numbers, 8 * numbers)
