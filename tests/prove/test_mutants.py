"""Every known mistake, planted, makes `prove` fail in the class that is about it; unplanted, the same call passes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mutants
import pytest
from tiny import MODEL, WORDS, World

import pertoken.prove.ranks
from pertoken import load_tokenizer
from pertoken.folders.open import save_folder
from pertoken.model.decoder import CausalLM
from pertoken.prove.report import Result
from pertoken.prove.run import NAMES, prove
from pertoken.recipe.model import ModelConfig

pytestmark = pytest.mark.numeric

RECIPES: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {
        "model__use_moe": True,
        "model__num_experts": 4,
        "model__num_experts_per_tok": 2,
        "model__aux_loss_coef": 0.5,
    },
    "z-loss": {"train__z_loss_coef": 0.1},
    "z-loss, moe": {"model__use_moe": True, "model__num_experts": 4, "train__z_loss_coef": 0.1},
    "capped": {"model__family": "gemma3", "model__final_logit_softcapping": 0.7},
    "multiplied": {"model__family": "granite", "model__residual_multiplier": 0.7, "model__logits_scaling": 0.5},
    "muon": {"train__optimizer": "muon", "train__warmup_steps": 3},
    "float16": {"train__dtype": "float16"},
    "seven": {"train__seed": 7},
    "truncated": {"data__max_seq_len": 100, "data__overlong": "truncate"},
    "pretrain": {"stage": "pretrain", "data__max_seq_len": 100, "data__eval_path": []},
    "odd vocabulary": {"model__vocab_size": 3001},  # not a multiple of 16
    "large vocabulary": {
        "model__vocab_size": 100_000,
        "model__hidden_size": 64,
        "model__num_hidden_layers": 1,
        "train__dtype": "bfloat16",
    },
    "two blocks": {"model__vocab_size": 9001},  # of the vocabulary
    "adapter": {"model": {}, "adapter__kind": "lora", "adapter__r": 4},
}
PLANTED = [
    # mistake, the class that must fail, recipe of RECIPES
    ("mean_of_micro_batch_means", "accumulation", "dense"),
    ("mean_of_micro_batch_means", "one sample per micro-batch", "dense"),
    ("labels_not_shifted", "one micro-batch", "dense"),
    ("labels_shifted_twice", "one micro-batch", "dense"),
    ("padding_supervised", "one micro-batch", "dense"),
    ("padding_in_the_count", "one micro-batch", "dense"),
    ("tail_of_the_epoch_dropped", "every sample once an epoch", "dense"),
    ("tail_under_scaled", "short last step", "dense"),
    ("balance_loss_times_accumulation", "accumulation", "moe"),
    ("balance_loss_by_supervised_tokens", "one micro-batch", "moe"),
    ("router_dead", "accumulation", "moe"),
    ("z_loss_without_a_gradient", "one micro-batch", "z-loss"),
    ("z_loss_without_a_gradient", "head in chunks", "z-loss"),
    ("z_loss_of_the_label_too", "one micro-batch", "z-loss"),
    ("z_loss_as_a_mean_of_micro_batch_means", "reference loss", "z-loss"),
    ("z_loss_as_a_mean_of_micro_batch_means", "accumulation", "z-loss"),
    ("z_loss_times_accumulation", "accumulation", "z-loss"),
    ("z_loss_of_every_token", "reference loss", "z-loss, moe"),
    ("z_loss_lost_by_the_kernels", "kernels", "z-loss"),
    ("z_loss_lost_by_the_kernels", "head in chunks, kernels", "z-loss"),
    ("z_loss_in_the_evaluation", "evaluation", "z-loss"),
    ("soft_cap_without_its_slope", "one micro-batch", "capped"),
    ("soft_cap_without_its_slope", "head in chunks", "capped"),
    ("soft_cap_without_its_slope_by_the_kernels", "kernels", "capped"),
    ("soft_cap_without_its_slope_by_the_kernels", "head in chunks, kernels", "capped"),
    ("logits_not_scaled", "one micro-batch", "multiplied"),
    ("residual_multiplier_without_a_gradient", "kernels", "multiplied"),
    ("clipping_before_unscaling", "clipping under a loss scale", "dense"),
    ("a_sample_twice_in_a_step", "one micro-batch", "dense"),
    ("a_sample_twice_in_an_epoch", "every sample once an epoch", "dense"),
    ("attention_across_documents", "one micro-batch", "dense"),
    ("attention_across_documents", "shuffled", "dense"),
    ("prompt_supervised", "who is supervised", "dense"),
    ("end_of_turn_unsupervised", "who is supervised", "dense"),
    ("ignore_index_as_a_label", "one micro-batch", "dense"),
    ("ignore_index_learned", "one micro-batch", "dense"),
    ("casts_outlive_their_step", "kernels", "dense"),
    ("kernels_see_one_ahead", "kernels", "dense"),
    ("rows_beside_the_asked_ones", "kernels", "dense"),
    ("head_gradient_lost", "kernels", "dense"),
    ("replaced_projection_not_seen", "changed modules", "dense"),
    ("bias_not_seen", "changed modules", "dense"),
    ("hook_not_seen", "changed modules", "dense"),
    ("hook_not_seen", "changed modules", "moe"),
    ("frozen_matrix_learns", "changed modules", "dense"),
    ("adapter_scale_lost_by_the_kernels", "kernels", "adapter"),
    ("adapter_gradients_without_the_last_row", "kernels", "adapter"),
    ("adapter_scaled_by_alpha", "adapter, by the textbook", "adapter"),
    ("frozen_weights_in_the_norm", "adapter, by the textbook", "adapter"),
    ("optimizer_state_lost", "resume in mid-epoch", "adapter"),
    ("optimizer_state_lost", "resume in mid-epoch", "dense"),
    # What is not the gradient of one step.
    ("label_lost_at_each_cut", "rows, token by token", "pretrain"),
    ("end_of_document_lost", "rows, token by token", "pretrain"),
    ("one_token_too_many_in_truncation", "rows, token by token", "truncated"),
    ("one_token_too_few_in_truncation", "rows, token by token", "truncated"),
    ("the_same_order_in_every_epoch", "every sample once an epoch", "dense"),
    ("seed_ignored", "every sample once an epoch", "seven"),
    ("not_shuffled", "every sample once an epoch", "dense"),
    ("lr_one_step_late", "update, clipped", "muon"),
    ("lr_set_after_the_update", "update, not clipped", "dense"),
    ("decay_from_the_first_step", "learning rate", "muon"),
    ("clipping_of_matrices_only", "clipping under a loss scale", "dense"),
    ("clipping_of_matrices_only", "norm, in the run's dtype", "dense"),
    ("clipping_twice", "norm, in the run's dtype", "dense"),
    ("clipping_by_the_largest_gradient", "clipping under a loss scale", "dense"),
    ("clipping_by_the_largest_gradient", "update, clipped", "muon"),
    ("norm_of_matrices_only", "norm, in the run's dtype", "dense"),
    ("norm_of_matrices_only", "update, clipped", "dense"),
    ("norm_in_float32", "norm, in the run's dtype", "large vocabulary"),
    ("unscaling_by_the_last_loss_scale", "clipping under a loss scale", "dense"),
    ("unscaling_by_the_last_loss_scale", "update, clipped", "dense"),
    ("reported_norm_after_clipping", "norm, in the run's dtype", "dense"),
    ("reported_norm_after_clipping", "update, clipped", "dense"),
    ("float16_boost_kept", "float16 under its loss scale", "float16"),
    ("overflow_not_skipped", "float16 under its loss scale", "float16"),
    ("norms_decay", "update, not clipped", "dense"),
    ("norms_decay", "update, clipped", "muon"),
    ("bias_correction_lost", "update, not clipped", "dense"),
    ("muon_without_its_shape_factor", "update, clipped", "muon"),
    ("evaluation_as_a_mean_of_means", "evaluation", "dense"),
    # Code that a few short samples do not reach.
    ("second_chunk_lost", "head in chunks", "odd vocabulary"),
    ("second_chunk_lost_by_the_kernels", "head in chunks, kernels", "odd vocabulary"),
    ("tail_of_the_vocabulary_without_a_gradient", "head in chunks, kernels", "odd vocabulary"),
    ("last_block_of_the_vocabulary_lost", "head in chunks, kernels", "two blocks"),
    ("columns_beyond_a_block_unseen", "long documents", "dense"),
    ("second_block_of_queries_adds_nothing_to_keys", "long documents", "dense"),
]

IN_RANKS = [
    # mistake, the classes that must fail, recipe
    ("world_size_missing", ["DDP, 2 ranks", "FSDP2, 2 ranks"], "dense"),
    ("world_size_twice", ["DDP, 3 ranks", "FSDP2, 3 ranks"], "dense"),
    ("mean_of_micro_batch_means", ["DDP, 2 ranks"], "dense"),
    ("rows_reversed_when_read_back", ["update, FSDP2, 3 ranks"], "muon"),
    ("rows_reversed_when_sharded", ["update, FSDP2, 3 ranks"], "muon"),
    ("lr_one_step_late", ["update, DDP, 2 ranks"], "muon"),
    ("evaluation_as_a_mean_of_means", ["evaluation, 3 ranks"], "muon"),
]


def results_of(world: World, folder: Path, names: Sequence[str], recipe: str) -> list[Result]:
    """Of some classes, on samples made anew."""
    changes = dict(RECIPES[recipe])
    if recipe == "pretrain":
        text = folder / "text.txt"
        text.write_text(" ".join(WORDS * 20))
        changes["data__path"] = str(text)
    if recipe == "adapter":
        model = CausalLM(ModelConfig(**MODEL).resolve(len(load_tokenizer(world.folder / "tokenizer"))))
        save_folder(model, folder / "base", eos_token_id=None)
        changes["init_from"] = str(folder / "base")
    parsed = world.recipe(folder / "run", data__store=str(folder / "store"), train__batch_size=8, **changes)
    proof = prove(parsed, only=names, tokens=40 if recipe == "large vocabulary" else 600)
    assert [result.name for result in proof.results] == list(names)
    assert proof.holds == all(result.verdict != "failed" for result in proof.results)
    return list(proof.results)


@pytest.fixture(scope="module")
def unplanted(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Result]:
    """The same calls without a mistake, one for each recipe."""
    found: dict[tuple[str, str], Result] = {}
    for recipe in RECIPES:
        names = [name for name in NAMES if any((name, recipe) == (n, r) for _, n, r in PLANTED)]
        for result in results_of(world, tmp_path_factory.mktemp("right"), names, recipe):
            found[result.name, recipe] = result
    return found


@pytest.mark.parametrize(("mistake", "name", "recipe"), PLANTED, ids=[f"{m}-{n}" for m, n, _ in PLANTED])
def test_a_planted_mistake_is_found(world, tmp_path, monkeypatch, unplanted, mistake, name, recipe):
    right = unplanted[name, recipe]
    assert right.verdict == "passed", right
    mutants.plant(mistake, monkeypatch)
    (wrong,) = results_of(world, tmp_path, [name], recipe)
    assert wrong.verdict == "failed", wrong
    errors = [wrong.gradient_error, abs(wrong.norm_ratio - 1)]
    if errors[0] == errors[0]:  # else it did not come so far
        assert max(errors) > (2e-6 if mistake.startswith("norm_") else 1e-3)


def test_a_dead_router_is_named_though_the_norm_hardly_moves(world, tmp_path, monkeypatch):
    mutants.router_dead(monkeypatch)
    monkeypatch.setitem(RECIPES["moe"], "model__aux_loss_coef", 1e-3)
    (wrong,) = results_of(world, tmp_path, ["accumulation"], "moe")
    assert wrong.worst.endswith("mlp.gate.weight")
    assert abs(wrong.norm_ratio - 1) < 1e-3


@pytest.mark.parametrize("recipe", ["dense", "muon"])
def test_the_ranks_pass_unplanted(world, tmp_path, recipe):
    names = [name for name in NAMES if any(name in of and recipe == r for _, of, r in IN_RANKS)]
    assert [r.verdict for r in results_of(world, tmp_path, names, recipe)] == ["passed"] * len(names)


@pytest.mark.parametrize(("mistake", "names", "recipe"), IN_RANKS, ids=[f"{m}-{n}" for m, n, _ in IN_RANKS])
def test_a_mistake_planted_in_every_rank_is_found(world, tmp_path, monkeypatch, mistake, names, recipe):
    monkeypatch.setattr(pertoken.prove.ranks, "COMMAND", (sys.executable, mutants.__file__, mistake))
    for wrong in results_of(world, tmp_path, names, recipe):
        assert wrong.verdict == "failed", wrong
        assert wrong.gradient_error > 0.01, wrong
