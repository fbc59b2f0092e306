"""What a step does when numbers, memory or the loss scale go wrong."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import World, pertoken, rows_of

from pertoken import train
from pertoken.checkpoints import read as checkpoint_module
from pertoken.data.tokens.tokenizer import load_tokenizer
from pertoken.errors import PertokenError
from pertoken.folders.weights import save_folder
from pertoken.model.decoder import CausalLM
from pertoken.runs.data import prepare
from pertoken.tracking.listener import Listener
from pertoken.training.evaluate import Evaluation, evaluate
from pertoken.training.precision import Precision

pytestmark = pytest.mark.numeric


class Told(Listener):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.stats: list = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def gradients(self, stats) -> None:
        self.stats.append(list(stats))


def weights_of(run, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def starting_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    def new_scaler(self: Precision) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=scale, enabled=self.dtype == "float16")

    monkeypatch.setattr(Precision, "new_scaler", new_scaler)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_float16_overflow_skips_the_update_halves_the_scale_and_is_logged(world, tmp_path, monkeypatch, optimizer):
    starting_scale(monkeypatch, 2.0**30)
    told = Told()
    changes = {"train__optimizer": optimizer, "train__dtype": "float16", "train__max_steps": 30}
    recipe = world.recipe(tmp_path / "run", **changes, checkpoint__save_interval=1)
    recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"keep_last": 99})})
    train(recipe, listener=told)
    rows = rows_of(tmp_path / "run")
    count = [row["skipped"] for row in rows].index(False)
    assert 1 <= count < 30
    assert rows[0]["loss_scale"] == 2.0**30
    for before, after in itertools.pairwise(rows):
        assert after["loss_scale"] == before["loss_scale"] / (2 if before["skipped"] else 1)
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert all((row["grad_norm"] is None) == row["skipped"] for row in rows)
    start = CausalLM(recipe.model.resolve(len(load_tokenizer(world.folder / "tokenizer"))), seed=42).state_dict()
    for name, weight in weights_of(tmp_path / "run", count).items():
        assert torch.equal(weight, start[name]), name
    moved = weights_of(tmp_path / "run", count + 1)
    assert any(not torch.equal(moved[name], start[name]) for name in moved)
    assert len(told.messages) == sum(row["skipped"] for row in rows)
    assert "update skipped, scale halved" in told.messages[0]
    saved, _ = checkpoint_module.newest_checkpoint(tmp_path / "run")
    assert saved.state.scaler["scale"] == rows[-1]["loss_scale"] / (2 if rows[-1]["skipped"] else 1)


def test_float16_gradients_do_not_depend_on_the_loss_scale(world, tmp_path, monkeypatch):
    """The head's gradient is formed in the forward pass and must carry the scale that the others carry."""
    norms = {}
    for scale in (2.0**4, 2.0**12):
        starting_scale(monkeypatch, scale)
        out = tmp_path / str(scale)
        told = Told()
        train(world.recipe(out, train__dtype="float16", train__max_steps=1, log__grad_stats=True), listener=told)
        norms[scale] = {s.name: s.norm for s in told.stats[0]}
    for name, norm in norms[2.0**12].items():
        assert norms[2.0**4][name] == pytest.approx(norm, rel=0.02), name


def poisoned(world: World, folder):
    """A model folder that any unknown character makes NaN. Untied, or that row of the head would reach every sample."""
    tokenizer = load_tokenizer(world.folder / "tokenizer")
    config = world.recipe(folder, model__tie_word_embeddings=False).model.resolve(len(tokenizer))
    save_folder(CausalLM(config, seed=1), folder, tokenizer=tokenizer, eos_token_id=tokenizer.eos_token_id)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer.unk_token_id] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_non_finite_loss_stops_before_the_weights_are_touched_and_names_the_one_sample(world, tmp_path, dtype):
    start = poisoned(world, tmp_path / "start")
    lines = (world.folder / "chats.jsonl").read_text().splitlines(keepends=True)
    lines[29] = lines[29].replace('"content": "', '"content": "\u00df ', 1)
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(lines))
    run = tmp_path / "run"
    recipe = world.write_recipe(
        run,
        data__path=str(chats),
        data__eval_path=[],
        init_from=str(start),
        model__tie_word_embeddings=False,
        train__dtype=dtype,
        train__micro_batch_tokens=1500,
        train__max_steps=13,
        train__batch_size=8,
        checkpoint__save_interval=1,
        checkpoint__keep_last=13,
    )
    code, _, err = pertoken("train", recipe)
    assert code == 3
    step = len(rows_of(run)) + 1
    assert step > 2, "there were good steps before"
    assert f"step {step}: the loss is nan; the weights were not touched and step {step - 1} is saved" in err
    assert err.splitlines()[1:3] == [
        "first: the output of model.embed_tokens, whose parameter model.embed_tokens.weight is not finite already",
        f"non-finite by itself: {chats}:30",
    ]
    kept = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    assert kept[-1] == f"step-{step - 1:08d}"
    unknown = load_tokenizer(start).unk_token_id
    for name, weight in weights_of(run, step - 1).items():
        rows = torch.arange(len(weight)) != unknown if name == "model.embed_tokens.weight" else slice(None)
        assert weight[rows].isfinite().all(), name


def test_out_of_memory_halves_the_budget_and_gives_the_same_step(world, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    train(world.recipe(whole, train__max_steps=3))
    real, limit = CausalLM.forward, 1200

    def forward(self, micro_batch, *args, **kwargs):
        if micro_batch.input_ids.shape[0] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, micro_batch, *args, **kwargs)

    monkeypatch.setattr(CausalLM, "forward", forward)
    told, run = Told(), tmp_path / "run"
    recipe = world.recipe(run, train__max_steps=3, data__eval_path=[])
    train(recipe, listener=told)
    assert "out of memory; train.micro_batch_tokens halved to" in told.messages[0]
    for a, b in zip(rows_of(whole), rows_of(run), strict=True):
        assert b["micro_batches"] > a["micro_batches"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    saved, _ = checkpoint_module.newest_checkpoint(run)
    assert saved.state.micro_batch_tokens <= limit

    limit = 10
    with pytest.raises(PertokenError, match="one sample in a micro-batch"):
        train(world.recipe(tmp_path / "hopeless", train__max_steps=1, data__eval_path=[]))


def test_gradient_statistics_are_of_the_true_gradients_and_name_what_has_none(world, tmp_path):
    told = Told()
    train(world.recipe(tmp_path / "run", train__max_steps=1, log__grad_stats=True), listener=told)
    (stats,) = told.stats
    assert len(stats) == 24
    norm = math.sqrt(sum(s.norm**2 for s in stats))
    assert norm == pytest.approx(rows_of(tmp_path / "run")[0]["grad_norm"], rel=1e-6)

    from pertoken.training.gradient_stats import gradient_stats

    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[1.0, 3.0], [1.0, 3.0]])
    weight, bias = gradient_stats(model)
    assert (weight.mean, weight.std, weight.norm) == pytest.approx((2.0, 1.0, math.sqrt(20)))
    assert bias.norm is None


def test_clipping_scales_the_true_gradient_to_the_maximum():
    """With plain SGD, for AdamW's first step forgets how long a gradient is."""
    from pertoken.training.step import TrainState

    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision = Precision("float32", torch.device("cpu"))
    state = TrainState(model, optimizer, precision.new_scaler(), precision)
    for max_norm, moved in ((1.0, 1.0), (0.0, 5.0), (10.0, 5.0)):
        before = model.weight.detach().clone()
        model.weight.grad = torch.tensor([[3.0, 4.0, 0.0]])
        norm, skipped = state.clip_and_step(1.0, max_norm)
        assert (norm, skipped) == (5.0, False)
        assert float((model.weight.detach() - before).norm()) == pytest.approx(moved, rel=1e-5)
        assert model.weight.grad is None


def test_evaluation_is_token_weighted_split_invariant_and_restores_the_mode(world, tmp_path):
    recipe = world.recipe(tmp_path / "run")
    _, store = prepare(recipe)
    model = CausalLM(recipe.model.resolve(64), seed=0, dtype=torch.float64)
    precision = Precision("float64", torch.device("cpu"))
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    for mode in (True, False):
        model.train(mode)
        results = [evaluate(model, store, precision, token_budget=budget) for budget in (1, 700, 10**6)]
        assert model.training is mode
    assert not any(seen)
    assert np.ptp([r.loss for r in results]) < 1e-12
    assert results[0].num_tokens == store.num_tokens.sum()
    assert results[0].bits_per_byte == pytest.approx(results[0].loss_sum / math.log(2) / store.num_bytes.sum())


def test_training_and_evaluation_agree_on_the_denominator(world, tmp_path):
    """The loss of an epoch's single step, before any update, is the evaluation loss of the same rows."""
    recipe = world.recipe(
        tmp_path / "run",
        data__eval_path=str(world.folder / "chats.jsonl"),
        train__batch_size=101,
        train__max_steps=1,
        train__learning_rate=1e-30,
    )
    train(recipe)
    (row,) = rows_of(tmp_path / "run")
    assert row["eval_loss"] == pytest.approx(row["loss"], rel=1e-6)


def evaluations_of(monkeypatch, *losses):
    """The evaluations to come have these losses, in turn."""
    coming = iter(losses)

    def evaluated(model, store, precision, **settings):
        return Evaluation(100.0 * next(coming), 100.0, 100)

    monkeypatch.setattr("pertoken.training.evaluate.evaluate", evaluated)


def kept_by(run):
    """Checkpoints, and the one that `best` names."""
    folder = run / "checkpoints"
    return sorted(int(p.name[5:]) for p in folder.glob("step-*")), (folder / "best").resolve().name


@pytest.mark.parametrize("in_background", [True, False])
def test_the_last_valid_checkpoints_and_the_best_are_kept(world, tmp_path, monkeypatch, in_background):
    keys = {"train__max_steps": 12, "train__eval_interval": 2, "checkpoint__save_interval": 1}
    recipe = world.recipe(tmp_path / "run", **keys, checkpoint__keep_last=2, checkpoint__async_save=in_background)
    evaluations_of(monkeypatch, 5.0, 3.0, 4.0, 3.5, 3.1, 6.0)  # the best is far from the last
    assert train(recipe).best_eval_loss == 3.0
    assert kept_by(tmp_path / "run") == ([4, 11, 12], "step-00000004")


def test_the_best_before_a_resume_stays_the_best_until_a_better_one_comes(world, tmp_path, monkeypatch):
    keys = {"train__eval_interval": 2, "checkpoint__save_interval": 2, "checkpoint__keep_last": 2}
    run = tmp_path / "run"
    evaluations_of(monkeypatch, 3.0, 5.0, 6.0)
    train(world.recipe(run, train__max_steps=6, **keys))
    assert kept_by(run) == ([2, 4, 6], "step-00000002")
    evaluations_of(monkeypatch, 4.0)
    assert train(world.recipe(run, train__max_steps=8, **keys), resume=True).best_eval_loss == 3.0
    assert kept_by(run) == ([2, 6, 8], "step-00000002")
    evaluations_of(monkeypatch, 2.0)
    assert train(world.recipe(run, train__max_steps=10, **keys), resume=True).best_eval_loss == 2.0
    assert kept_by(run) == ([8, 10], "step-00000010")


def test_the_last_step_and_each_epochs_end_are_saved_without_an_interval(world, tmp_path):
    run = tmp_path / "run"
    train(world.recipe(run, train__max_steps=9, checkpoint__keep_last=9, checkpoint__keep_best=False))
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-00000007", "step-00000009"]
