"""A frozen weight gets no gradient, costs none of its work, and changes no other's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoder_cases import BATCHES, MODELS, batch_of, gradient, largest_error, model_of
from torch import Tensor, nn

from pertoken.checkpoints.read import Checkpoint, load_model, load_optimizer
from pertoken.checkpoints.saver import save_checkpoint
from pertoken.checkpoints.state import TrainerState
from pertoken.data.batch.share import share_of_all
from pertoken.engines.cpu.engine import CpuEngine
from pertoken.kernels.ops import Kernels
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.recipe.train import TrainConfig
from pertoken.training.optimizers import build_optimizer
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

pytestmark = pytest.mark.numeric

BATCH = batch_of(*BATCHES["short"])
FLOAT32 = Precision("float32", torch.device("cpu"))


def kinds(changes: dict[str, Any]) -> list[str]:
    """Every parameter of the first layer, of the last (in which not every row is asked for), and of no layer."""
    names = [name for name, _ in model_of(changes, torch.float32).named_parameters()]
    return [name for name in names if ".layers." not in name or ".layers.0." in name or ".layers.2." in name]


CASES = [(family, name) for family, changes in MODELS.items() for name in kinds(changes) if ".experts.1" not in name]


@pytest.fixture(scope="module")
def exact() -> dict[str, tuple[dict[str, Tensor], float]]:
    """For each model all gradients in float64, and the plain decoder's own error in float32."""
    found = {}
    for family, changes in MODELS.items():
        _, expected = gradient(model_of(changes, torch.float64), BATCH)
        _, plain = gradient(model_of(changes, torch.float32), BATCH)
        found[family] = expected, largest_error(plain, expected)
    return found


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family}-{name}" for family, name in CASES])
def test_one_frozen_or_all_but_one(exact, family, name, kernels):
    expected, error = exact[family]
    for frozen in ({name}, expected.keys() - {name}):
        model = model_of(MODELS[family], torch.float32)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name not in frozen)
        execution = Execution(CpuEngine(torch.float32)) if kernels else PLAIN
        assert execution.engine.supports(model) is None
        _, found = gradient(model, BATCH, execution)
        learned = {n: g for n, g in expected.items() if n not in frozen}
        assert largest_error(found, learned) <= 3 * error  # which wants the same names, so no gradient of a frozen one


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("batch", ["short", "all supervised"])
def test_frozen_matrices_cost_no_product_and_no_transpose(batch, low, monkeypatch):
    def work(frozen: bool) -> list[str]:
        model = model_of({}, torch.float32)
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.requires_grad_(not frozen)
        execution = Execution(CpuEngine(torch.bfloat16 if low else torch.float32))
        calls: list[str] = []
        with monkeypatch.context() as patch:
            real, mm = Kernels._call, torch.mm
            patch.setattr(Kernels, "_call", lambda *args, **kw: calls.append(args[1]) or real(*args, **kw))
            patch.setattr(torch, "mm", lambda *args, **settings: calls.append("mm") or mm(*args, **settings))
            gradient(model, batch_of(*BATCHES[batch]), execution, low=low)
        return calls

    without, with_them = work(frozen=True), work(frozen=False)
    of_weights = 3 * 4 + (
        batch != "all supervised"
    )  # q k v, out, gate and up, down; q apart from k v in the last block
    assert with_them.count("mm") - without.count("mm") == of_weights
    assert with_them.count("cast_and_transpose") == 2 * 3
    for transposing in ("cast_and_transpose", "norm_transposed"):
        assert transposing in with_them
        assert transposing not in without


def test_a_frozen_tied_embedding_costs_no_gradient_of_the_head(monkeypatch):
    model = model_of({}, torch.float32)
    model.model.embed_tokens.requires_grad_(False)
    execution = Execution(CpuEngine(torch.float32))
    calls: list[str] = []
    real = Kernels._call
    monkeypatch.setattr(Kernels, "_call", lambda *args, **kw: calls.append(args[1]) or real(*args, **kw))
    out = model(BATCH, execution)
    assert "widen_transposed" not in calls
    out.loss_sum.backward()
    assert model.model.embed_tokens.weight.grad is None


def test_casts_kept_in_a_step_are_right_for_frozen_weights_too():
    model = model_of({}, torch.float32)
    model.model.layers[0].requires_grad_(False)
    with Execution(CpuEngine(torch.bfloat16)).keeping_casts() as keeping:
        once = gradient(model, BATCH, keeping, low=True)
        again = gradient(model, BATCH, keeping, low=True)
    assert once[0] == again[0]
    assert all(torch.equal(again[1][name], g) for name, g in once[1].items())


FROZEN = {
    "embedding and one layer": lambda name: "embed" in name or ".layers.0." in name,
    "all but the matrices of the blocks": lambda name: "proj" not in name,
    "all but norms": lambda name: "norm" not in name,
}


def step(model: CausalLM, optimizer: torch.optim.Optimizer) -> float:
    metrics = train_step(
        TrainState(model, optimizer, FLOAT32.new_scaler(), FLOAT32, execution=Execution(CpuEngine(torch.float32))),
        share_of_all([BATCH]),
        lr=1e-2,
        max_norm=0.1,
    )
    assert metrics.grad_norm > 0.1
    return metrics.loss_sum


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_training_saving_and_resuming_leave_frozen_weights_as_they_are(frozen, optimizer_name, tmp_path):
    """Clipping is by the norm of what learns; a resumed run, frozen alike, takes bitwise the same step."""
    train = TrainConfig(optimizer=optimizer_name, learning_rate=1e-2, weight_decay=0.5)

    def prepared(model: CausalLM) -> torch.optim.Optimizer:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen(name))
        return build_optimizer(model, train)

    model = model_of({}, torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = prepared(model)
    step(model, optimizer)
    assert all(p.grad is None for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == frozen(name), name
    state = TrainerState(step=1, recipe={}, data={}, scaler={}, micro_batch_tokens=0)
    saved = save_checkpoint(tmp_path, model=model, tokenizer=None, eos_token_id=0, optimizer=optimizer, state=state)
    again = load_model(saved)
    its_optimizer = prepared(again)
    load_optimizer(Checkpoint(saved), again, its_optimizer)
    assert step(model, optimizer) == step(again, its_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
