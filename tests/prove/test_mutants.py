"""Every known mistake, planted, makes `prove` fail in the class that is about it; unplanted, the same call passes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mutants
import pytest
from tiny import World

import pertoken.prove.ranks
from pertoken.prove.report import Result
from pertoken.prove.run import prove

pytestmark = pytest.mark.numeric

DENSE: dict[str, Any] = {}
MOE = {"model__use_moe": True, "model__num_experts": 4, "model__num_experts_per_tok": 2, "model__aux_loss_coef": 0.5}
PLANTED = [
    # mistake, the class that must fail, recipe
    ("mean_of_micro_batch_means", "accumulation", DENSE),
    ("mean_of_micro_batch_means", "one sample per micro-batch", DENSE),
    ("labels_not_shifted", "one micro-batch", DENSE),
    ("labels_shifted_twice", "one micro-batch", DENSE),
    ("padding_supervised", "one micro-batch", DENSE),
    ("padding_in_the_count", "one micro-batch", DENSE),
    ("tail_of_the_epoch_dropped", "every sample once an epoch", DENSE),
    ("tail_under_scaled", "short last step", DENSE),
    ("balance_loss_times_accumulation", "accumulation", MOE),
    ("balance_loss_by_supervised_tokens", "one micro-batch", MOE),
    ("router_dead", "accumulation", MOE),
    ("clipping_before_unscaling", "clipping under a loss scale", DENSE),
    ("a_sample_twice_in_a_step", "one micro-batch", DENSE),
    ("a_sample_twice_in_an_epoch", "every sample once an epoch", DENSE),
    ("attention_across_documents", "one micro-batch", DENSE),
    ("attention_across_documents", "shuffled", DENSE),
    ("prompt_supervised", "who is supervised", DENSE),
    ("end_of_turn_unsupervised", "who is supervised", DENSE),
    ("ignore_index_as_a_label", "one micro-batch", DENSE),
    ("ignore_index_learned", "one micro-batch", DENSE),
    ("casts_outlive_their_step", "kernels", DENSE),
    ("kernels_see_one_ahead", "kernels", DENSE),
    ("rows_beside_the_asked_ones", "kernels", DENSE),
    ("head_gradient_lost", "kernels", DENSE),
    ("replaced_projection_not_seen", "changed modules", DENSE),
    ("bias_not_seen", "changed modules", DENSE),
    ("hook_not_seen", "changed modules", DENSE),
    ("hook_not_seen", "changed modules", MOE),
    ("frozen_matrix_learns", "changed modules", DENSE),
    ("optimizer_state_lost", "resume in mid-epoch", DENSE),
]
IN_RANKS = [
    ("world_size_missing", "DDP, 2 ranks"),
    ("world_size_missing", "FSDP2, 2 ranks"),
    ("world_size_twice", "DDP, 3 ranks"),
    ("world_size_twice", "FSDP2, 3 ranks"),
    ("mean_of_micro_batch_means", "DDP, 2 ranks"),
]


def result_of(world: World, folder: Path, name: str, changes: dict[str, Any]) -> Result:
    """Of one class, on samples made anew."""
    recipe = world.recipe(folder / "run", data__store=str(folder / "store"), train__batch_size=8, **changes)
    proof = prove(recipe, only=[name])
    (result,) = proof.results
    assert result.name == name
    assert proof.holds == (result.verdict != "failed")
    return result


@pytest.fixture(scope="module")
def unplanted(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Result]:
    """The same calls without a mistake."""
    found: dict[tuple[str, bool], Result] = {}
    for _, name, changes in PLANTED:
        if (name, bool(changes)) not in found:
            found[name, bool(changes)] = result_of(world, tmp_path_factory.mktemp("right"), name, changes)
    return found


@pytest.mark.parametrize(("mistake", "name", "changes"), PLANTED, ids=[f"{m}-{n}" for m, n, _ in PLANTED])
def test_a_planted_mistake_is_found(world, tmp_path, monkeypatch, unplanted, mistake, name, changes):
    right = unplanted[name, bool(changes)]
    assert right.verdict == "passed", right
    getattr(mutants, mistake)(monkeypatch)
    wrong = result_of(world, tmp_path, name, changes)
    assert wrong.verdict == "failed", wrong
    if wrong.gradient_error == wrong.gradient_error:  # else it did not come so far
        assert wrong.gradient_error > 1e-3


def test_a_dead_router_is_named_though_the_norm_hardly_moves(world, tmp_path, monkeypatch):
    mutants.router_dead(monkeypatch)
    wrong = result_of(world, tmp_path, "accumulation", {**MOE, "model__aux_loss_coef": 1e-3})
    assert wrong.worst.endswith("mlp.gate.weight")
    assert abs(wrong.norm_ratio - 1) < 1e-3


def test_the_ranks_pass_unplanted(world, tmp_path):
    for name in sorted({name for _, name in IN_RANKS}):
        assert result_of(world, tmp_path, name, DENSE).verdict == "passed"


@pytest.mark.parametrize(("mistake", "name"), IN_RANKS)
def test_a_mistake_planted_in_every_rank_is_found(world, tmp_path, monkeypatch, mistake, name):
    monkeypatch.setattr(pertoken.prove.ranks, "COMMAND", (sys.executable, mutants.__file__, mistake))
    wrong = result_of(world, tmp_path, name, DENSE)
    assert wrong.verdict == "failed", wrong
    assert wrong.gradient_error > 0.1, wrong
