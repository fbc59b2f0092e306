"""The adapter inside the real Megatron-Core, on a CPU: its schedule, its DDP, its finalize_model_grads, its GPTModel.

megatron-core is imported as it is, through `megatron_cpu`, with no `importorskip`: where it is missing these tests are
an error, never a skip.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron_cpu import (
    Result,
    in_bfloat16,
    megatron_model,
    megatron_step,
    on_cpu,
    our_model,
    our_step,
    padded,
    ranks,
    single,
    tiny,
    worst,
    wrap,
)
from megatron_names import from_megatron, join, to_megatron
from megatron_two_ranks import MODELS, splits, unchecked, work

from pertoken.adapters.megatron import forward_step
from pertoken.errors import RecipeError

pytestmark = pytest.mark.numeric

FAMILIES = [("qwen3", False), ("qwen3", True), ("llama", False), ("llama", True)]
TOLERANCE = 1e-6  # of the largest entry of each parameter's gradient


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ranks(tmp_path_factory.mktemp("one-rank")):
        yield


@pytest.fixture
def one_rank(group: None) -> Iterator[None]:
    with on_cpu():
        yield


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("two-ranks")
    torch.multiprocessing.spawn(work, args=(folder,), nprocs=2)
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


def assert_equal_steps(result: Result, reference: Result) -> None:
    assert result.loss == pytest.approx(reference.loss, rel=TOLERANCE)
    error, name = worst(result, reference)
    assert error < TOLERANCE, name


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_weights_go_to_megatron_and_come_back(family, tied):
    config = tiny(family, tied, layers=2)
    weights = {name: p.detach() for name, p in our_model(config).named_parameters()}
    back = from_megatron(to_megatron(weights, config), config)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


ONE_RANK_SPLITS = {
    "all at once": ([[0, 1, 2, 3, 4, 5, 6]], 1),
    "unequal counts, one empty": ([[0, 1], [2], [3, 4, 5], [6]], 4),
    "one by one": ([[i] for i in range(7)], 7),
    "the iterator ends early": ([[0, 1, 2], [3, 4, 5, 6]], 5),
}


@pytest.mark.parametrize("split", ONE_RANK_SPLITS)
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_megatron_takes_our_own_step(one_rank, family, tied, split):
    """The same samples and weights in GPTModel and in our decoder: the same loss and the same gradients."""
    ours = our_model(tiny(family, tied))
    chosen, num_micro_batches = ONE_RANK_SPLITS[split]
    batches = [single(some[0]) if len(some) == 1 else padded(some, mask_dtype=torch.float32) for some in chosen]
    result = megatron_step(wrap(megatron_model(ours)), ours.config, batches, num_micro_batches)
    assert_equal_steps(result, our_step(ours))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_two_layers_are_as_near_to_float64_as_our_own_step(one_rank, family):
    """Deeper, the rounding of either engine alone comes near 1e-6, so both are held against the exact gradient."""
    ours = our_model(tiny(family, False, layers=2))
    result = megatron_step(wrap(megatron_model(ours)), ours.config, [padded([0, 1, 2]), padded([3, 4, 5, 6])], 2)
    reference = our_step(ours)
    exact = our_step(our_model(ours.config).double())
    assert result.loss == pytest.approx(exact.loss, rel=TOLERANCE)
    assert worst(result, exact)[0] < 4 * worst(reference, exact)[0]


@pytest.mark.parametrize("split", splits())
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_take_our_own_step(two_ranks, model, split):
    reference = our_step(our_model(tiny(*MODELS[model])))
    for rank in two_ranks:
        assert_equal_steps(Result(**rank[f"{model}: {split}"]), reference)


def test_two_tensor_parallel_ranks_take_our_own_step(two_ranks):
    """With an iterator that ends before the schedule does."""
    config = tiny("llama", True)
    parts = [Result(**rank["tensor parallel"]) for rank in two_ranks]
    whole = {name: join(name, [part.gradients[name] for part in parts]) for name in parts[0].gradients}
    for part in parts:
        assert_equal_steps(Result(part.loss, from_megatron(whole, config)), our_step(our_model(config)))


def test_two_pipeline_stages_take_our_own_step(two_ranks):
    config = tiny("qwen3", False, layers=2)
    first, last = (Result(**rank["pipeline parallel"]) for rank in two_ranks)
    second_layer = {name.replace("layers.0.", "layers.1."): gradient for name, gradient in last.gradients.items()}
    reference = our_step(our_model(config))
    assert_equal_steps(Result(last.loss, from_megatron(first.gradients | second_layer, config)), reference)


def test_multi_token_prediction_does_not_learn_padding(one_rank):
    """Its further losses are computed inside of the model, which is why the mask has to go in: how the samples are
    split, and so padded, must not matter."""
    ddp = wrap(megatron_model(our_model(tiny("qwen3", False)), mtp_num_layers=1))
    split = megatron_step(ddp, None, [single(i) for i in range(7)], 8)
    together = megatron_step(ddp, None, [padded([0, 1, 2]), padded([3, 4, 5, 6])], 2)
    assert "mtp.layers.0.eh_proj.weight" in split.gradients
    assert_equal_steps(together, split)


def test_the_default_is_refused_and_would_have_been_wrong(one_rank):
    ours = our_model(tiny("llama", True))
    batches = [padded([0, 1]), single(2), padded([3, 4, 5]), single(6)]
    ddp = wrap(megatron_model(ours, per_token=False))
    with pytest.raises(RecipeError, match=r"^calculate_per_token_loss=False: .*; set it to True in the Transformer"):
        megatron_step(ddp, ours.config, batches, 4)
    reference = our_step(ours)
    with unchecked():
        error, _ = worst(megatron_step(ddp, ours.config, batches, 4), reference)
    assert error > 1e-2
    assert worst(megatron_step(wrap(megatron_model(ours)), ours.config, batches, 4), reference)[0] < TOLERANCE


def test_the_default_is_refused_on_every_rank_and_would_have_been_wrong(two_ranks):
    reference = our_step(our_model(tiny(*MODELS["llama"])))
    for rank in two_ranks:
        assert rank["default: message"].startswith("calculate_per_token_loss=False: ")
        assert worst(Result(**rank["default: unchecked"]), reference)[0] > 1e-2


def test_a_flag_set_after_wrapping_is_refused_and_would_have_halved_the_gradient(two_ranks):
    reference = our_step(our_model(tiny(*MODELS["llama"])))
    for rank in two_ranks:
        assert "was set after DistributedDataParallel had been built" in rank["late: message"]
        late = Result(**rank["late: unchecked"])
        assert late.loss == pytest.approx(reference.loss, rel=TOLERANCE)  # the loss would not have told
        doubled = Result(late.loss, {name: 2 * gradient for name, gradient in late.gradients.items()})
        assert worst(doubled, reference)[0] < TOLERANCE


def test_a_flag_set_after_wrapping_is_refused_where_the_collective_averages(one_rank):
    ours = our_model(tiny("llama", True))
    ddp = wrap(megatron_model(ours, per_token=False), average=True)
    ddp.config.calculate_per_token_loss = True
    with pytest.raises(RecipeError, match="was set after DistributedDataParallel had been built"):
        megatron_step(ddp, ours.config, [padded([0, 1])], 1)


def test_a_step_without_supervised_tokens_is_finite_and_zero(one_rank):
    ours = our_model(tiny("qwen3", False))
    result = megatron_step(wrap(megatron_model(ours)), ours.config, [padded([2, 5]), single(2)], 3)
    assert torch.equal(torch.stack(result.reports), torch.zeros(3, 2))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in result.gradients.values())


@pytest.mark.parametrize("batches", [[], [{"input_ids": [], "labels": [], "loss_mask": []}]], ids=["none", "no tokens"])
def test_an_exhausted_iterator_gives_every_parameter_a_zero_gradient(one_rank, batches):
    model = megatron_model(our_model(tiny("qwen3", False)))
    rows = iter([{key: torch.tensor(value, dtype=torch.int64) for key, value in b.items()} for b in batches])
    output, loss = forward_step(rows, model)
    loss_sum, num_tokens, _ = loss(output)
    loss_sum.backward()
    assert (float(loss_sum.detach()), int(num_tokens)) == (0.0, 0)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_wrappers_of_low_precision_are_seen_through(one_rank):
    """DDP(Float16Module(GPTModel)): the flag is found, and the sum is in float32."""
    ours = our_model(tiny("llama", False))
    ddp = wrap(in_bfloat16(megatron_model(ours)))
    result = megatron_step(ddp, ours.config, [padded([0, 1, 2, 3]), padded([4, 5, 6])], 2)
    assert result.reports[0].dtype == torch.float32
    assert result.loss == pytest.approx(our_step(ours).loss, rel=1e-2)
    ddp.module.config.calculate_per_token_loss = False
    with pytest.raises(RecipeError, match="calculate_per_token_loss=False"):
        forward_step(iter([padded([0])]), ddp)


def test_an_explicit_causal_mask_changes_nothing_and_a_narrower_one_does(one_rank):
    model = megatron_model(our_model(tiny("qwen3", False)))
    batch = padded([0, 3])
    length = batch["input_ids"].shape[1]
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    itself_alone = ~torch.eye(length, dtype=torch.bool).expand(2, 1, length, length)
    plain, same, other = (
        forward_step(iter([batch | mask]), model)[0]
        for mask in ({}, {"attention_mask": causal}, {"attention_mask": itself_alone})
    )
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, other)


def test_the_page_s_code_runs_as_it_stands(one_rank):
    """docs/megatron.md, block by block; what is the user's own is given here."""
    page = (Path(__file__).parents[2] / "docs" / "megatron.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    ours = our_model(tiny("llama", False))
    model = megatron_model(ours)
    cfg = SimpleNamespace(model=SimpleNamespace(), ddp=SimpleNamespace())
    given: dict[str, Any] = {}

    def pretrain(config: Any, forward_step_func: Any) -> None:
        given["step"] = forward_step_func

    names: dict[str, Any] = {"model": model, "cfg": cfg, "pretrain": pretrain}
    for block in blocks:
        exec(block, names)
    assert cfg.model.calculate_per_token_loss
    assert not cfg.ddp.average_in_collective

    batch = names["batch"]
    counted = batch["loss_mask"]
    with torch.no_grad():
        logits = megatron_model(ours)(batch["input_ids"], torch.arange(4).expand(2, 4), None)
    wanted = F.cross_entropy(logits[counted], batch["labels"][counted])
    assert float(names["loss_sum"] / names["num_tokens"]) == pytest.approx(float(wanted), rel=TOLERANCE)
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}

    batch["tokens"] = batch.pop("input_ids")  # as Megatron's data sets have it
    again = megatron_step(names["ddp"], None, [batch], 2, given["step"])
    assert all(torch.equal(again.gradients[name], gradient) for name, gradient in gradients.items())
