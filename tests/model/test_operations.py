"""What is counted as useful, and what as padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pertoken.data.batch.pack import Sample, collate
from pertoken.model import plain
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import Execution
from pertoken.model.operations import body_parameters
from pertoken.recipe.model import ModelConfig

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"use_moe": True, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def model(**changes):
    return CausalLM(ModelConfig(**SHAPE, **changes).resolve(50), seed=1)


def batch(lengths, share=1.0):
    rng = np.random.default_rng(0)
    return collate([Sample(rng.integers(0, 50, n + 1), np.arange(n) < share * n) for n in lengths])


@pytest.mark.parametrize("changes", [{}, EXPERTS, {"family": "qwen2"}, {"family": "gemma3"}])
def test_the_body_is_every_active_matrix_but_embedding_and_head(changes):
    ours = model(**changes)
    vectors = sum(p.numel() for p in ours.parameters() if p.ndim == 1)
    head = 0 if ours.lm_head is None else ours.lm_head.weight.numel()
    embedding = ours.model.embed_tokens.weight.numel()
    assert body_parameters(ours.config) == ours.num_active_parameters - vectors - embedding - head


@pytest.mark.parametrize(("lengths", "padded_pairs"), [((20, 19, 18), 3 * 400 - 400 - 361 - 324), ((7, 7), 0)])
def test_padding_is_what_the_rectangles_add(lengths, padded_pairs):
    padding, total = model().padding(batch(lengths))
    pairs = sum(n * n for n in lengths)
    n, layers, width = sum(lengths), 3, 4 * 16
    assert float(padding) == 6 * layers * width * padded_pairs
    useful = 6 * body_parameters(model().config) * n + 6 * 50 * 32 * n + 6 * layers * width * pairs
    assert float(total) == useful + float(padding)


def test_the_count_is_that_of_torchs_own_counter():
    """In one rectangle, all supervised, and attention in plain code, which computes both halves of the square."""
    ours, lengths = model(), (64, 60, 56)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        ours(batch(lengths), Execution(loss_impl="reference")).objective({"supervised": 1.0, "inputs": 1.0}).backward()
    half_of_attention = 6 * 3 * 4 * 16 * 3 * 64**2
    assert counter.get_total_flops() == float(ours.padding(batch(lengths))[1]) + half_of_attention


def test_head_operations_are_those_of_supervised_rows():
    ours = model()
    all_of_it, half = (float(ours.padding(batch((10, 10), share))[1]) for share in (1.0, 0.5))
    assert all_of_it - half == 6 * 50 * 32 * 10


def test_nothing_is_padding_where_documents_are_read_in_place(monkeypatch):
    monkeypatch.setattr(plain, "which_attention", lambda *_: "varlen")
    padding, total = model().padding(batch((20, 19, 18)))
    assert float(padding) == 0.0
    assert float(total) > 0


def test_shares_of_micro_batches_add_up_whatever_their_sizes():
    """The metric is a (sum, count): two micro-batches weigh what they compute."""
    ours = model()
    parts = [ours(batch(lengths)).metrics["padding"] for lengths in ((200, 150), (3,))]
    padding, total = (sum(float(x[i]) for x in parts) for i in range(2))
    assert 0 < padding / total < float(parts[0][0] / parts[0][1])


def test_an_empty_micro_batch_adds_nothing():
    assert [float(x) for x in model().padding(batch(()))] == [0.0, 0.0]


def test_float_weights_count_rows_not_weights():
    ours, lengths = model(), (5, 4)
    micro_batch = collate([Sample(np.arange(n + 1), np.full(n, 0.25, np.float32)) for n in lengths])
    assert torch.equal(ours.padding(micro_batch)[1], ours.padding(batch(lengths))[1])
