"""Passes that are recorded for a GPU: padded micro-batches compute what they are padded from, and a replay reads what
is new. A CPU has no graphs: here a replay is the same code over the same buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pertoken.data.batch.pack import MicroBatch, Sample, collate
from pertoken.data.batch.pad import Shape, pad, shape_of
from pertoken.data.batch.share import share_of_all
from pertoken.engines.cuda_graphs import Graphs, graphs_for, why_no_graphs
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN
from pertoken.objective.terms import CROSS_ENTROPY
from pertoken.recipe.model import ModelConfig
from pertoken.training.optimizers.adamw import build_adamw
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
FLOAT64 = Precision("float64", CPU)
VOCAB = 61
LENGTHS = [(40, 9, 1), (1,), (64,), (63,), (30, 30, 30, 30, 8), (70, 50)]


def batch(lengths: tuple[int, ...], kind: str, seed: int = 0) -> MicroBatch:
    rng = np.random.default_rng(seed)

    def mask(n: int) -> np.ndarray:
        some = rng.random(n) < (1.0 if kind == "all" else 0.5)
        some[-1] = True
        return some * rng.random(n).astype(np.float32) if kind == "weights" else some

    return collate([Sample(rng.integers(0, VOCAB, n + 1), mask(n)) for n in lengths])


def model(**keys: object) -> CausalLM:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return CausalLM(ModelConfig.model_validate(shape | keys).resolve(VOCAB), seed=1, dtype=torch.float64)


class Again(Graphs):
    """Replays by computing again what the buffers then hold."""

    recorded = 0

    def _record(self, compute):
        self.recorded += 1
        metrics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        kept = {}

        def replay() -> None:
            kept.update(compute())
            for name, pair in kept.items():
                metrics.setdefault(name, pair)
                for target, source in zip(metrics[name], pair, strict=True):
                    target.detach().copy_(source.detach())

        return replay, metrics


@pytest.mark.parametrize("kind", ["some", "all", "weights"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_padded_micro_batch_has_the_loss_and_the_gradient_of_its_own(lengths, kind):
    plain = batch(lengths, kind)
    shape = shape_of(plain)
    filled = pad(plain, shape)
    assert (len(filled.input_ids), len(filled.lengths), len(filled.supervised_rows())) == (
        shape.tokens,
        shape.samples,
        shape.rows,
    )
    assert max(filled.lengths) <= shape.longest
    assert len(filled.cu_seqlens) == shape.samples + 1
    assert filled.cu_seqlens.tolist() == [0, *np.cumsum(filled.lengths)]
    found = []
    for one in (plain, filled):
        ours = model()
        out = ours(one)
        out.objective({"supervised": 7.0, "inputs": 9.0}).backward()
        found.append((out, [p.grad for p in ours.parameters()]))
    (mine, gradients), (padded, of_padded) = found
    assert float(padded.num_tokens) == pytest.approx(float(mine.num_tokens), rel=1e-7)
    torch.testing.assert_close(padded.loss_sum, mine.loss_sum, rtol=1e-12, atol=0)
    for a, b in zip(of_padded, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_shapes_are_few_and_padding_is_little():
    rng = np.random.default_rng(0)
    shapes = set()
    for seed in range(300):
        lengths = tuple(rng.integers(100, 340, 16).tolist())
        one = batch(lengths, "some", seed)
        shape = shape_of(one)
        assert 0 < shape.tokens - sum(lengths) <= max(64, sum(lengths) / 8)
        rows = len(one.supervised_rows())
        assert rows <= shape.rows <= min(shape.tokens, rows * 1.25 + 64)
        shapes.add(shape)
    assert len(shapes) <= 20


def steps(graphs: bool, **keys: object) -> tuple[list[tuple[float, float, float]], list[torch.Tensor], int]:
    ours = model(**keys)
    state = TrainState(ours, build_adamw(ours, weight_decay=0.1, betas=(0.9, 0.95)), FLOAT64.new_scaler(), FLOAT64)
    if graphs:
        state.graphs = graphs_for(ours, CROSS_ENTROPY, CPU, PLAIN, FLOAT64.autocast)
        state.graphs.__class__ = Again
    rows = []
    for seed in range(5):  # two shapes, in turn
        batches = [batch((40, 9, 1), "some", seed), batch((50, 60), "weights", seed)]
        metrics = train_step(state, share_of_all(batches), lr=1e-2, max_norm=1.0)
        rows.append((metrics.loss_sum, metrics.num_tokens, metrics.grad_norm))
        padding, operations = metrics.sums["padding"]
        assert 0 <= float(padding) < operations
    recorded = state.graphs.recorded if isinstance(state.graphs, Again) else 0
    return rows, [p.detach() for p in ours.parameters()], recorded


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": False}, {"family": "gemma3"}], ids=str)
def test_steps_that_are_replayed_are_the_steps_that_are_not(keys):
    (rows, weights, _), (again, of_again, recorded) = (steps(graphs, **keys) for graphs in (False, True))
    assert recorded == 2
    for mine, theirs in zip(rows, again, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-7)  # weights are float32 in a padded mask
    for a, b in zip(of_again, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_a_user_s_hook_or_new_weight_is_heard():
    ours = model()
    graphs = graphs_for(ours, CROSS_ENTROPY, CPU, PLAIN, FLOAT64.autocast)
    graphs.__class__ = Again
    for _ in range(2):
        assert graphs.begin()
        graphs.run(batch((9,), "all"), {"supervised": 9.0, "inputs": 9.0})
    assert graphs.recorded == 1
    ours.lm_head = None
    ours.model.norm.weight = torch.nn.Parameter(ours.model.norm.weight.detach().clone())
    assert graphs.begin()
    graphs.run(batch((9,), "all"), {"supervised": 9.0, "inputs": 9.0})
    assert graphs.recorded == 1, "forgotten, and seen once"
    ours.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not graphs.begin()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device": CPU}, "for CUDA"),
        ({"ranks": 2}, "one process"),
        ({"model": torch.nn.Linear(2, 2)}, "own decoder"),
        ({"dtype": "float32"}, "bfloat16"),
    ],
)
def test_why_passes_are_not_recorded_is_said(change, says):
    keys = {"model": model(), "dtype": "bfloat16", "device": torch.device("cuda"), "execution": PLAIN} | change
    assert says in why_no_graphs(**keys)


def test_padding_is_never_of_another_shape():
    with pytest.raises(AssertionError):
        pad(batch((9,), "all"), Shape(9, 2, 9, 128))
