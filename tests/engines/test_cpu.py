"""The engine "cpu" computes what the plain modules do: same sums, same gradients, for every shape of batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decoder_cases import BATCHES, MODELS, VOCAB, batch_of, gradient, largest_error, model_of

from pertoken.data.batch.pack import collate
from pertoken.engines.cpu import attention as cpu_attention
from pertoken.engines.cpu import blocks, halves, runner
from pertoken.engines.cpu.engine import CpuEngine
from pertoken.kernels import ops
from pertoken.model.execution import Execution
from pertoken.objective import cross_entropy as loss

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_sums_and_gradients_are_as_near_to_float64_as_the_plain_decoder_s(batch, changes):
    micro_batch = batch_of(*batch)
    exact_loss, exact = gradient(model_of(changes, torch.float64), micro_batch)
    model = model_of(changes, torch.float32)
    _, plain = gradient(model, micro_batch)
    _, plain_low = gradient(model, micro_batch, low=True)
    by_kernels = Execution(CpuEngine(torch.float32))
    cpu_loss, found = gradient(model, micro_batch, by_kernels)
    assert cpu_loss == pytest.approx(exact_loss, rel=1e-6)
    assert largest_error(found, exact) <= 3 * largest_error(plain, exact)
    if model.config.use_moe:
        return  # rounding may send a token to another expert, and which one does not compare
    low_loss, found_low = gradient(model, micro_batch, by_kernels, low=True)
    assert low_loss == pytest.approx(exact_loss, rel=2e-3)
    assert largest_error(found_low, exact) <= 3 * largest_error(plain_low, exact)


def test_a_checkpointed_layer_gives_bitwise_the_same():
    micro_batch, model = batch_of(*BATCHES["blocks"]), model_of({}, torch.float32)
    engine = CpuEngine(torch.float32)
    once, expected = gradient(model, micro_batch, Execution(engine))
    again, found = gradient(model, micro_batch, Execution(engine, activation_checkpointing=True))
    assert once == again
    assert all(torch.equal(found[name], g) for name, g in expected.items())


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_nothing_is_read_before_it_is_written(batch, family, monkeypatch):
    """Rows that round a product up hold whatever was there before, NaN for one, unless they are set to zero."""

    def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    for module in (runner, cpu_attention, blocks, halves, ops, loss):
        monkeypatch.setattr(module, "empty", poisoned)
    model = model_of(MODELS[family], torch.float32)
    _, found = gradient(model, batch_of(*batch), Execution(CpuEngine(torch.bfloat16)), low=True)
    assert [name for name, g in found.items() if not g.isfinite().all()] == []


def test_a_second_backward_pass_is_refused():
    model = model_of({}, torch.float32)
    execution = Execution(CpuEngine(torch.float32))
    objective = model(batch_of(*BATCHES["short"]), execution).objective({"supervised": 1.0, "inputs": 1.0})
    objective.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        objective.backward()


def test_weights_are_cast_once_while_casts_are_kept():
    model, micro_batch = model_of({}, torch.float32), batch_of(*BATCHES["short"])
    execution = Execution(CpuEngine(torch.bfloat16))
    with execution.keeping_casts() as keeping:
        before, _ = gradient(model, micro_batch, keeping, low=True)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.zero_()
        kept, _ = gradient(model, micro_batch, keeping, low=True)
    after, _ = gradient(model, micro_batch, execution, low=True)
    assert kept == before
    assert after != before


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_an_empty_micro_batch_gives_zeros_to_all_parameters(family):
    model = model_of(MODELS[family], torch.float32)
    nothing, found = gradient(model, collate([]), Execution(CpuEngine(torch.float32)))
    assert nothing == 0
    assert len(found) == len(list(model.parameters()))
    assert all(torch.count_nonzero(g) == 0 for g in found.values())


def test_attention_needs_memory_linear_in_a_long_document_s_length():
    heads = cpu_attention.Heads(4, 2, 16, 0.25)
    sizes = []
    for length in (4096, 8192):
        plan = cpu_attention.AttentionPlan.of([length], heads)
        sizes.append(max(block.documents * heads.query * block.rows * block.columns for block in plan.blocks))
        assert sum(b.rows * b.columns for b in plan.blocks) < 0.6 * length**2  # little above the diagonal
    assert sizes[1] <= 2 * sizes[0]


def test_few_shapes_for_many_lengths():
    heads = cpu_attention.Heads(8, 4, 64, 0.125)
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(200):
        lengths = sorted(rng.integers(90, 340, 16).tolist(), reverse=True)
        shapes |= {(b.documents, b.rows, b.columns) for b in cpu_attention.AttentionPlan.of(lengths, heads).blocks}
    assert len(shapes) <= 9 * 4  # widths times powers of two


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_a_label_outside_of_the_vocabulary_is_an_error(bad):
    model = model_of({}, torch.float32)
    micro_batch = batch_of(*BATCHES["all supervised"])
    micro_batch.labels[3] = bad
    with pytest.raises(IndexError, match="vocabulary has 101"):
        model(micro_batch, Execution(CpuEngine(torch.float32)))
