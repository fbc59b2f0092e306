"""Runs that train an adapter: their checkpoints, their resumption, and what opens them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import World, pertoken, rows_of, untimed

from pertoken import Recipe, load_model, train
from pertoken.checkpoints.read import newest_checkpoint
from pertoken.data.batch.order import step_at
from pertoken.data.batch.pack import collate
from pertoken.data.store.store import Store
from pertoken.errors import CheckpointError, ModelError, RecipeError
from pertoken.folders.adapters import adapt, save_adapter
from pertoken.model.lora import Base, is_of_adapter
from pertoken.runs.data import prepare
from pertoken.tracking.listener import Listener
from pertoken.training.schedule import lr_at

pytestmark = pytest.mark.numeric

LORA: dict[str, Any] = {"model": {}, "adapter__kind": "lora", "adapter__r": 4, "train__learning_rate": 1e-2}
between_peft_and_transformers = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def base(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, to be adapted."""
    out = tmp_path_factory.mktemp("base") / "run"
    train(world.recipe(out, train__max_steps=12))
    return out


@pytest.fixture(scope="module")
def run(world: World, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that trains an adapter of `base`."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    train(recipe_of(world, out, base))
    return out


def recipe_of(world: World, out: Path, base: Path, **changes: Any) -> Recipe:
    return world.recipe(out, **LORA | {"init_from": str(base), "train__max_steps": 10} | changes)


def folder_of(run: Path) -> Path:
    checkpoint, _ = newest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint.folder


def logits_of(model: Any, store: Store) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.hidden_states(collate([store[0]]))
        logits: torch.Tensor = model.logits(hidden)
    return logits


def test_a_checkpoint_holds_the_adapter_and_its_optimizer_state_alone(run, base):
    names = {path.name for path in folder_of(run).iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} < names
    assert not names & {"config.json", "model.safetensors"}
    state = load_file(folder_of(run) / "optimizer.safetensors")
    assert state
    assert all(is_of_adapter(name) for name in state)
    weights = load_file(folder_of(run) / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * 2
    assert all(name.startswith("base_model.model.model.layers.") for name in weights)
    config = json.loads((folder_of(run) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder_of(base))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 32, False)


@pytest.mark.parametrize(
    ("dtype", "frozen"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(world, base, tmp_path, dtype, frozen):
    changes = {"train__dtype": dtype, "model": {"frozen_dtype": frozen}, "checkpoint__save_interval": 4}
    train(recipe_of(world, tmp_path / "whole", base, **changes))
    cut = recipe_of(world, tmp_path / "cut", base, **changes)
    train(cut)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000010")
    assert folder_of(tmp_path / "cut").name == "step-00000008"
    train(cut, resume=True)
    whole = rows_of(tmp_path / "whole")
    assert untimed(rows_of(tmp_path / "cut")) == untimed(whole)
    assert whole[-1]["loss"] < whole[0]["loss"] - 0.02
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        a, b = ((folder_of(tmp_path / which) / name).read_bytes() for which in ("whole", "cut"))
        assert a == b


def test_plain_modules_train_the_same_adapter(world, run, base, tmp_path):
    train(recipe_of(world, tmp_path / "plain", base, train__engine="plain"))
    for ours, plain in zip(rows_of(run), rows_of(tmp_path / "plain"), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_nothing_of_the_base_has_changed(run, base):
    adapted, plain = load_model(run), load_model(base)
    own = {name: p for name, p in adapted.named_parameters() if not is_of_adapter(name)}
    assert all(torch.equal(own[name], p) for name, p in plain.named_parameters())
    assert not any(p.requires_grad for p in own.values())


@between_peft_and_transformers
def test_a_plain_loop_over_pefts_model_gives_the_same_ten_steps(world, base, tmp_path, peft):
    from transformers import AutoModelForCausalLM

    recipe = recipe_of(world, tmp_path / "ours", base, adapter__rslora=True, adapter__alpha=3.0)
    train(recipe)
    store, _ = prepare(recipe)
    start = load_model(base)
    adapt(start, recipe.adapter, Base(str(folder_of(base))), seed=recipe.train.seed)
    save_adapter(start, tmp_path / "start", eos_token_id=None)
    hf = AutoModelForCausalLM.from_pretrained(folder_of(base), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(hf, tmp_path / "start", is_trainable=True)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=0.1, betas=(0.9, 0.95))
    for row in rows_of(tmp_path / "ours"):
        step = row["step"]
        ids = step_at(step, num_samples=len(store), batch_size=16, seed=42).sample_ids
        samples = [store[int(i)] for i in ids]
        num_tokens, loss = sum(int(sample.loss_mask.sum()) for sample in samples), 0.0
        for sample in samples:
            logits = model(input_ids=torch.tensor(sample.input_ids.astype("int64"))[None]).logits[0]
            nll = F.cross_entropy(logits, torch.tensor(sample.labels.astype("int64")), reduction="none")
            part = nll[torch.tensor(sample.loss_mask)].sum() / num_tokens
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(learned, 1.0)
        lr = lr_at(
            step, peak=1e-2, warmup_steps=0, total_steps=10, schedule="cosine", min_lr_ratio=0.1, decay_ratio=0.2
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@between_peft_and_transformers
def test_peft_opens_a_checkpoint_with_the_same_logits_and_pertoken_what_peft_saves(world, run, tmp_path, peft):
    store, _ = prepare(world.recipe(tmp_path / "unused"))
    ours = logits_of(load_model(run), store)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder_of(run))
    input_ids = torch.tensor(store[0].input_ids.astype("int64"))[None]
    with torch.no_grad():
        assert (model(input_ids=input_ids).logits[0] - ours).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "theirs")
    assert torch.equal(logits_of(load_model(tmp_path / "theirs"), store), ours)


def test_merged_it_is_a_folder_that_transformers_opens(world, run, tmp_path):
    from transformers import AutoModelForCausalLM

    store, _ = prepare(world.recipe(tmp_path / "unused"))
    code, out, err = pertoken("export", run, "--out", tmp_path / "merged", "--merge")
    assert (code, err) == (0, ""), out
    ours = logits_of(load_model(run), store)
    assert (logits_of(load_model(tmp_path / "merged"), store) - ours).abs().max() < 1e-5
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        theirs = hf(input_ids=torch.tensor(store[0].input_ids.astype("int64"))[None]).logits[0]
    assert (theirs - ours).abs().max() < 1e-5


def test_export_writes_the_adapter_or_says_what_is_missing(run, base, tmp_path):
    assert pertoken("export", run, "--out", tmp_path / "adapter")[0] == 0
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names > {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert pertoken("export", base, "--out", tmp_path / "x", "--merge")[2].startswith("error: --merge: ")
    assert "give --merge" in pertoken("export", run, "--out", tmp_path / "x", "--format", "minimind")[2]


def test_eval_chat_generate_and_replay_take_the_run_as_it_is(world, run):
    code, out, err = pertoken("eval", run, world.folder / "held-out.jsonl")
    assert (code, err) == (0, "")
    shown = float(next(line for line in out.splitlines() if line.startswith("loss")).split()[1])
    assert shown == pytest.approx(rows_of(run)[-1]["eval_loss"], abs=1e-4)
    assert pertoken("generate", run, "--prompt", "red", "--max-new-tokens", "3")[0] == 0
    assert pertoken("chat", run, "--max-new-tokens", "3", stdin="red\n")[0] == 0
    assert pertoken("replay", run, "--step", "10")[0] == 0


def test_a_base_that_moved_is_named_and_found_again_by_init_from(world, base, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(folder_of(base), here)
    train(recipe_of(world, tmp_path / "run", here, train__max_steps=4))
    here.rename(there)
    code, _, err = pertoken("eval", tmp_path / "run", world.folder / "held-out.jsonl")
    assert code == 2
    assert f"base_model_name_or_path={here}: the base model is not there; put it back" in err
    more = {"train__max_steps": 6}
    with pytest.raises(CheckpointError, match="say with init_from where the base is now"):
        train(recipe_of(world, tmp_path / "run", here, **more), resume=True)
    train(recipe_of(world, tmp_path / "run", there, **more), resume=True)
    config = json.loads((folder_of(tmp_path / "run") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(there)
    weights = load_file(there / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.0001
    save_file(weights, there / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not the one that it was trained on \(model.safetensors changed\)"):
        train(recipe_of(world, tmp_path / "run", there, train__max_steps=8), resume=True)


class Messages(Listener):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def message(self, text: str) -> None:
        self.heard.append(text)


def test_an_adapter_is_continued_or_merged_and_trained_in_full(world, run, base, tmp_path):
    train(recipe_of(world, tmp_path / "more", run, train__max_steps=2))
    assert rows_of(tmp_path / "more")[0]["loss"] < rows_of(run)[0]["loss"] - 0.02
    config = json.loads((folder_of(tmp_path / "more") / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder_of(base))
    heard = Messages()
    full = {"adapter__kind": "none", "adapter__r": 16}
    train(recipe_of(world, tmp_path / "full", run, train__max_steps=2, **full), listener=heard)
    assert any("an adapter; merged into its base" in text for text in heard.heard)
    assert rows_of(tmp_path / "full")[0]["loss"] == pytest.approx(rows_of(tmp_path / "more")[0]["loss"], rel=1e-5)
    assert (folder_of(tmp_path / "full") / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"adapter__r": 8}, "adapter.r=8: the adapter at .* has 4"),
        ({"adapter__alpha": 8.0}, "adapter.alpha=8.0: the adapter at .* has 32.0"),
        ({"adapter__targets": "q_proj"}, r"adapter.targets=\['q_proj'\]: the adapter at .* has down_proj, "),
    ],
)
def test_an_adapter_of_another_kind_is_not_continued(world, run, tmp_path, changes, why):
    with pytest.raises(RecipeError, match=why):
        train(recipe_of(world, tmp_path / "run", run, **changes))
    assert not (tmp_path / "run").exists()


def test_targets_that_the_model_lacks_and_new_tokens_are_refused(world, base, tmp_path):
    with pytest.raises(RecipeError, match=r"adapter.targets=c_attn: the model has no such layer to adapt; there are d"):
        train(recipe_of(world, tmp_path / "run", base, adapter__targets="c_attn"))
    with pytest.raises(RecipeError, match="an adapter trains no embeddings"):
        train(recipe_of(world, tmp_path / "run", base, data__add_tokens=["<new>"]))


REFUSED: dict[str, tuple[Any, str]] = {
    "use_dora": (True, "use_dora=True: pertoken has no such adapters"),
    "modules_to_save": (["lm_head"], "modules_to_save="),
    "rank_pattern": ({"q_proj": 2}, "rank_pattern="),
    "bias": ("all", "bias='all': pertoken has no such adapters"),
    "peft_type": ("IA3", "peft_type='IA3': pertoken has LORA"),
    "init_lora_weights": ("pissa", "changes the base's weights as well"),
    "r": ("four", "r='four': cannot be"),
    "base_model_name_or_path": (None, "base_model_name_or_path=None: cannot be"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_adapters_of_other_kinds_are_refused_by_name(run, tmp_path, key):
    value, why = REFUSED[key]
    folder = Path(shutil.copytree(folder_of(run), tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ModelError) as refused:
        load_model(folder)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_weights_that_do_not_fit_are_refused(run, tmp_path):
    folder = Path(shutil.copytree(folder_of(run), tmp_path / "adapter"))
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = min(weights)

    def refusal(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, path)
        with pytest.raises(ModelError) as refused:
            load_model(folder)
        return str(refused.value)

    assert "missing" in refusal({key: value for key, value in weights.items() if key != name})
    assert "is not [" in refusal(weights | {name: weights[name][:, :1].contiguous()})
    assert "no tensor: not the matrices of an adapter" in refusal({})
    assert "lm_head.weight: not the matrices of an adapter" in refusal(
        weights | {"base_model.model.lm_head.weight": torch.ones(1)}
    )
    other = name.replace("layers.0", "layers.7")
    assert "no linear layer of the base model" in refusal(weights | {other: weights[name].clone()})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 10**12}))  # more than any memory
    assert "is not [1000000000000, " in refusal({key: torch.zeros(0, 1) for key in weights})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    path.write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(folder)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pertoken does not unpickle adapters"):
        load_model(folder)


def test_an_adapter_in_float16_or_float64_trains_too(world, base, tmp_path):
    for dtype in ("float16", "float64"):
        train(recipe_of(world, tmp_path / dtype, base, train__dtype=dtype, train__max_steps=2))
    rows = [rows_of(tmp_path / dtype)[0]["loss"] for dtype in ("float16", "float64")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-2)
