"""The learning rate of every step, who decays, and Muon against its formulas."""

from __future__ import annotations

import math

import pytest
import torch

from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig
from pertoken.recipe.train import TrainConfig
from pertoken.training.optimizers import build_optimizer
from pertoken.training.optimizers import muon as muon_module
from pertoken.training.optimizers.adamw import build_adamw
from pertoken.training.optimizers.muon import build_muon, orthogonalized
from pertoken.training.schedule import count_total_steps, count_warmup_steps, lr_at, set_lr

pytestmark = pytest.mark.numeric


def rates(total: int, **kwargs) -> list[float]:
    kwargs = {"peak": 2.0, "warmup_steps": 0, **kwargs}
    return [lr_at(step, total_steps=total, **kwargs) for step in range(1, total + 1)]


def test_cosine_without_warm_up_is_minimind_s_formula():
    expected = [2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 50))) for step in range(1, 51)]
    assert rates(50) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_is_linear_from_the_first_step_and_ends_at_the_peak(schedule):
    assert rates(50, warmup_steps=10, schedule=schedule)[:10] == pytest.approx([0.2 * s for s in range(1, 11)])


@pytest.mark.parametrize(("schedule", "end"), [("cosine", 0.2), ("linear", 0.2), ("constant", 2.0), ("wsd", 0.2)])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_where_each_schedule_ends(schedule, end, warmup_steps):
    assert rates(50, warmup_steps=warmup_steps, schedule=schedule)[-1] == pytest.approx(end)


def test_linear_and_wsd_by_hand():
    assert rates(4, schedule="linear", min_lr_ratio=0.0) == pytest.approx([1.5, 1.0, 0.5, 0.0])
    assert rates(10, schedule="wsd", min_lr_ratio=0.0, decay_ratio=0.4) == pytest.approx(
        [2.0] * 6 + [1.5, 1.0, 0.5, 0.0]
    )


def test_a_run_longer_than_planned_stays_at_the_end():
    assert lr_at(80, peak=2.0, warmup_steps=0, total_steps=50) == pytest.approx(0.2)


def test_matrices_decay_and_norms_do_not():
    config = ModelConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8).resolve(11)
    model = CausalLM(config)
    optimizer = build_adamw(model, weight_decay=0.5, betas=(0.9, 0.95))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.5 if parameter.ndim == 2 else 0.0), name
    assert isinstance(optimizer, torch.optim.AdamW)


def small_model(dtype: torch.dtype = torch.float64, **changes) -> CausalLM:
    settings = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return CausalLM(ModelConfig(**settings, intermediate_size=40, **changes).resolve(11), dtype=dtype)


EXPERTS = {"use_moe": True, "num_experts": 3, "moe_intermediate_size": 8}


SHARED = {**EXPERTS, "family": "qwen2", "shared_expert_intermediate_size": 8}
FAMILIES = [{"family": "qwen2"}, {"family": "gemma3"}, SHARED]


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, EXPERTS, *FAMILIES])
def test_muon_has_the_blocks_matrices_and_adamw_all_else(changes):
    model = small_model(**changes)
    optimizer = build_muon(model, weight_decay=0.5, betas=(0.9, 0.95), lr_ratio=3.0, dtype=torch.float64)
    owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(owner)
    for name, parameter in model.named_parameters():
        group = owner[id(parameter)]
        mixes = name.endswith("_proj.weight")  # of attention, of an MLP, of each expert; not norms, tables, routers
        assert ("lr_ratio" in group) == mixes, name
        assert group["weight_decay"] == (0.5 if parameter.ndim == 2 else 0.0), name
    matrices = 32 if changes is SHARED else 26 if changes is EXPERTS else 14
    assert sum("_proj.weight" in name for name, _ in model.named_parameters()) == matrices


def test_the_schedule_scales_muon_and_adamw_alike():
    train = TrainConfig(optimizer="muon", learning_rate=0.004, muon_learning_rate=0.02)
    for settings, ratio in ((train, 5.0), (train.model_copy(update={"muon_learning_rate": None}), 1.0)):
        optimizer = build_optimizer(small_model(), settings)
        for lr in (0.001, 0.004):
            set_lr(optimizer, lr)
            *others, muon = (group["lr"] for group in optimizer.param_groups)
            assert others == [lr] * 2
            assert muon == pytest.approx(ratio * lr)
    assert isinstance(build_optimizer(small_model(), TrainConfig(learning_rate=1e-3)), torch.optim.AdamW)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (16, 16), (33, 16), (16, 33)])
def test_orthogonalizing_maps_each_singular_value_by_the_iteration(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert (orthogonalized(x) - (u * s[:, None]) @ vh).abs().max() < 1e-12
    assert torch.equal(orthogonalized(torch.zeros_like(x)), torch.zeros_like(x))


def steps_of(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Where six updates by the same random gradients lead, at a rate that changes."""
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        for parameter in parameters.values():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.to(parameter.dtype)
        set_lr(optimizer, 0.01 * (step + 1))
        optimizer.step()
    return {name: parameter.detach().double() for name, parameter in parameters.items()}


def muon_of(model: CausalLM, dtype: torch.dtype) -> torch.optim.Optimizer:
    return build_muon(model, weight_decay=0.3, betas=(0.8, 0.9), lr_ratio=2.0, dtype=dtype)


def test_muon_is_torchs_and_nearer_to_the_formula_than_that_where_it_computes_more_precisely():
    exact = small_model()
    start = {name: p.detach().clone() for name, p in exact.named_parameters()}
    exact_end = steps_of(muon_of(exact, torch.float64), dict(exact.named_parameters()))
    ends = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = small_model(torch.float32)
        ends[dtype] = steps_of(muon_of(model, dtype), dict(model.named_parameters()))

    reference = dict(small_model(torch.float32).named_parameters())
    mixing = [p for name, p in reference.items() if name.endswith("_proj.weight")]
    muon = torch.optim.Muon(mixing, lr=0.0, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    muon.param_groups[0]["lr_ratio"] = 2.0
    torch_end = steps_of(muon, reference)
    for name, end in exact_end.items():
        moved = (end - start[name]).norm()
        assert moved > 0.05, name

        def error(of: dict[str, torch.Tensor], name=name, end=end, moved=moved) -> float:
            return float((of[name] - end).norm() / moved)

        assert error(ends[torch.float32]) < 1e-5, name
        if name.endswith("_proj.weight"):
            assert 1e-4 < error(torch_end) < 0.05, name
            assert error(ends[torch.bfloat16]) < 2 * error(torch_end), name


def test_what_muon_leaves_is_updated_as_by_adamw():
    ours, plain = small_model(), small_model()
    optimizers = muon_of(ours, torch.float64), build_adamw(plain, weight_decay=0.3, betas=(0.8, 0.9))
    ends = [steps_of(o, dict(m.named_parameters())) for o, m in zip(optimizers, (ours, plain), strict=True)]
    for name, end in ends[0].items():
        assert torch.equal(end, ends[1][name]) == (not name.endswith("_proj.weight")), name


@pytest.mark.parametrize("numbers", [1, 500])
def test_how_many_matrices_are_stacked_changes_nothing(monkeypatch, numbers):
    ends = []
    for limit in (muon_module._NUMBERS_AT_A_TIME, numbers):
        monkeypatch.setattr(muon_module, "_NUMBERS_AT_A_TIME", limit)
        model = small_model()
        ends.append(steps_of(muon_of(model, torch.float64), dict(model.named_parameters())))
    for name, end in ends[0].items():
        assert (end - ends[1][name]).abs().max() < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs_to_the_bit(dtype):
    models = [small_model(dtype), small_model(dtype)]
    ours = build_adamw(models[0], weight_decay=0.3, betas=(0.8, 0.9))
    parts = ([p for p in models[1].parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, (0.3, 0.0), strict=True)]
    theirs = torch.optim.AdamW(groups, lr=0.0, betas=(0.8, 0.9), fused=True)
    for optimizer, model in zip((ours, theirs), models, strict=True):
        steps_of(optimizer, dict(model.named_parameters()))
        optimizer.zero_grad(set_to_none=True)
        model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)  # and the others have none
        optimizer.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name
        assert ours.state[a].keys() == theirs.state[b].keys()
        for key, value in theirs.state[b].items():
            assert torch.equal(ours.state[a][key], value), (name, key)
            assert ours.state[a][key].dtype == value.dtype


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "total"),
    [(2, 7, 14), (0.5, 7, 4), (1.5, 3, 5), (0.1, 30, 3), (1.1, 10, 11), (0.07, 100, 7), (1e-9, 30, 1)],
)
def test_a_fraction_of_the_steps_is_that_of_its_decimal_and_is_rounded_up(epochs, per_epoch, total):
    assert count_total_steps(epochs, per_epoch) == total
    if epochs < 1:
        assert count_warmup_steps(per_epoch, warmup_steps=0, warmup_ratio=epochs) == total
    assert count_warmup_steps(per_epoch, warmup_steps=3, warmup_ratio=None) == 3
