"""Mixture of experts: what is computed, what its balance loss is, and that the split of a step changes neither."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pertoken.data.batch.pack import Sample, collate
from pertoken.data.batch.share import share_of_all
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.model.moe import MixtureOfExperts, _num_rows
from pertoken.recipe.model import ModelConfig
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

pytestmark = pytest.mark.numeric

ROUTERS = [(4, 1, True), (4, 1, False), (5, 2, True), (5, 2, False), (3, 3, True), (1, 1, True)]  # E, k, norm_topk_prob
LENGTHS = [1, 7, 33, 34, 64, 5]


def config_of(experts=4, chosen=1, norm=True, **keys):
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    moe = {"use_moe": True, "num_experts": experts, "num_experts_per_tok": chosen, "norm_topk_prob": norm}
    return ModelConfig(**shape | moe | {"moe_intermediate_size": 24} | keys).resolve(61)


def small_model(experts=4, chosen=1, norm=True, dtype=torch.float64, spread=3.0, **keys):
    """`spread` multiplies the router's initial weights, so that the load is far from even."""
    model = CausalLM(config_of(experts, chosen, norm, **keys), dtype=dtype, seed=3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.mul_(spread)
    return model


def samples(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(0, 61, n + 1), rng.random(n) < 0.5) for n in lengths]


def router_logits(model):
    """A list that each forward pass of `model` fills with [N, E] per layer."""
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _m, _x, out: seen.append(out))
    return seen


def gradients(model, *micro_batches, supervised=50.0, inputs=144.0, execution=PLAIN):
    model.zero_grad()
    for micro_batch in micro_batches:
        model(micro_batch, execution).objective({"supervised": supervised, "inputs": inputs}).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def step_gradients(model, micro_batches):
    """Of one `train_step`, as the optimizer gets them."""
    precision = Precision("float64", torch.device("cpu"))
    state = TrainState(model, torch.optim.SGD(model.parameters(), lr=0.0), precision.new_scaler(), precision)
    kept = {}
    train_step(
        state,
        share_of_all(micro_batches),
        lr=0.0,
        max_norm=0.0,
        on_gradients=lambda: kept.update({n: p.grad.clone() for n, p in model.named_parameters()}),
    )
    return kept


# The layer


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_the_output_and_gradients_are_those_of_a_loop_over_tokens(router):
    torch.manual_seed(0)
    config = config_of(*router)
    layer = MixtureOfExperts(config).double()
    for n in (1, 7, 128, 129):
        x = torch.randn(n, 32, dtype=torch.float64, requires_grad=True)
        y, load = layer(x, torch.float64, None)
        assert load is None
        rows = []
        for token in x:
            probs = torch.exp(layer.gate.weight @ token) / torch.exp(layer.gate.weight @ token).sum()
            chosen = sorted(range(router[0]), key=lambda i: -float(probs[i].detach()))[: router[1]]
            total = sum(probs[i] for i in chosen) if router[2] else 1
            rows.append(sum(probs[i] / total * layer.experts[i](token) for i in chosen))
        expected = torch.stack(rows)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        weight = torch.randn_like(y)
        wanted = [x, *layer.parameters()]
        ours = torch.autograd.grad((y * weight).sum(), wanted, materialize_grads=True)
        for a, b in zip(
            ours, torch.autograd.grad((expected * weight).sum(), wanted, materialize_grads=True), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_single_expert_is_a_dense_model():
    mixture = small_model(experts=1)
    dense = CausalLM(ModelConfig(**mixture.config.model_dump(include=set(DENSE)), intermediate_size=24).resolve(61))
    dense.double().load_state_dict(
        {n.replace("experts.0.", ""): w for n, w in mixture.state_dict().items() if "mlp.gate.weight" not in n}
    )
    micro_batch = collate(samples())
    torch.testing.assert_close(dense(micro_batch).loss_sum, mixture(micro_batch).loss_sum, rtol=1e-12, atol=0)


DENSE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "tie_word_embeddings")


@pytest.mark.parametrize("chosen", [1, 2])
def test_decoding_with_a_cache_equals_the_training_forward(chosen):
    model = small_model(5, chosen)
    (row,) = samples([23])
    expected = model.logits(model.hidden_states(collate([row])))
    cache = model.new_cache(23)
    with torch.no_grad():
        for part in torch.from_numpy(row.input_ids).split([6, 1, 1, 9, 6]):
            logits = model.decode(part, cache)
            torch.testing.assert_close(logits, expected[cache.length - 1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chosen", [1, 2])
def test_experts_without_a_token_get_zeros_and_not_none(chosen):
    found = gradients(small_model(8, chosen), collate(samples([2])))
    for layer in range(3):
        norms = [float(found[f"model.layers.{layer}.mlp.experts.{i}.up_proj.weight"].norm()) for i in range(8)]
        assert 1 <= sum(norm > 0 for norm in norms) <= 2 * chosen, "two tokens reach few experts"


@pytest.mark.parametrize("aux_loss", ["sequence", "micro_batch", "none"])
@pytest.mark.parametrize("chosen", [1, 2])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_an_empty_micro_batch_gives_zeros_and_touches_every_parameter(aux_loss, chosen, autocast):
    model = small_model(5, chosen, dtype=torch.float32, aux_loss=aux_loss)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out, full = model(collate([])), model(collate(samples([3])))
        with torch.no_grad():
            assert float(model(collate([])).loss_sum) == 0.0
    out.objective({"supervised": 3.0, "inputs": 7.0}).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert out.metrics.keys() == full.metrics.keys() == {"loss", "padding", "aux_loss", "expert_load"}
    for name, pair in out.metrics.items():
        for value, expected in zip(pair, full.metrics[name], strict=True):
            assert (value.shape, value.dtype) == (expected.shape, expected.dtype), name
            assert not value.any(), name
            assert not expected.requires_grad, name
    assert (out.terms["aux_loss"].coefficient == 0) == (aux_loss == "none")


def test_without_a_balance_loss_every_parameter_still_has_a_gradient():
    for chosen in (1, 2):
        model = small_model(5, chosen, aux_loss="none")
        found = gradients(model, collate(samples()))  # which would fail for a gradient of None
        routers = [norm for name, grad in found.items() if "mlp.gate" in name for norm in [float(grad.norm())]]
        assert [norm > 0 for norm in routers] == [chosen > 1] * 3, "one renormalized choice has weight 1, a constant"
        assert float(model(collate(samples())).metrics["aux_loss"][0]) > 144


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("aux_loss", ["sequence", "micro_batch"])
def test_activation_checkpointing_changes_no_gradient(dtype, aux_loss):
    model, micro_batch = small_model(5, 2, dtype=torch.float32, aux_loss=aux_loss), collate(samples())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = gradients(model, micro_batch)
        recomputed = gradients(model, micro_batch, execution=Execution(activation_checkpointing=True))
    for name in plain:
        assert torch.equal(plain[name], recomputed[name]), name


def test_the_balance_gradient_itself_survives_activation_checkpointing():
    model, micro_batch = (
        small_model(4, 1, aux_loss_coef=1.0),
        collate(samples()),
    )  # with k = 1 it is the router's only one
    execution = Execution(activation_checkpointing=True)
    for name, grad in gradients(model, micro_batch, execution=execution).items():
        assert grad.norm() > 1e-6 or "mlp.gate" not in name, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_experts_are_low_and_the_router_is_not(dtype):
    model = small_model(dtype=torch.float32)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _m, _x, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", dtype=dtype):
        assert model.hidden_states(collate(samples())).dtype == torch.float32
    assert {seen[name] for name in seen if name.endswith("mlp.gate")} == {torch.float32}
    assert {seen[name] for name in seen if not name.endswith("mlp.gate")} == {dtype}


@pytest.mark.parametrize("chosen", [1, 2])
def test_autocast_error_of_the_layer_and_its_gradients_is_that_of_the_low_precision(chosen):
    torch.manual_seed(0)
    layer = MixtureOfExperts(config_of(4, chosen)).double()
    wanted = [name for name, _ in layer.named_parameters() if chosen > 1 or "gate.weight" not in name]

    def run(x, dtype):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = layer(x, dtype, None)
        y.square().sum().backward()
        return [x.grad.double(), y.detach(), *(dict(layer.named_parameters())[name].grad.double() for name in wanted)]

    for n in (5, 100, 700):  # few rows, and more than an expert's rows are rounded up to
        x = torch.randn(n, 32, dtype=torch.float64)
        layer.double()
        exact = run(x.clone().requires_grad_(), torch.float64)
        layer.float()
        low = run(x.float().requires_grad_(), torch.bfloat16)
        assert low[1].dtype == torch.float32
        for a, b in zip(low, exact, strict=True):
            assert float((a - b).norm()) <= 3 * torch.finfo(torch.bfloat16).eps * float(b.norm())


def test_rows_in_low_precision_come_in_few_sizes_and_cost_at_most_an_eighth():
    low, single = torch.empty(0, dtype=torch.bfloat16), torch.empty(0)
    for n in range(5000):
        assert _num_rows(n, single) == n
        assert n <= _num_rows(n, low) <= n * 9 / 8
    assert len({_num_rows(n, low) for n in range(5000)}) < 130


# The balance loss


def documents_of(micro_batch):
    ends = np.cumsum(micro_batch.lengths)
    return [slice(int(end) - n, int(end)) for end, n in zip(ends, micro_batch.lengths, strict=True)]


def plain_aux(logits, slices, chosen, *, divide_by_chosen):
    """sum over documents of T_s * sum_i f_i P_i, one layer's [N, E], written plainly."""
    total = 0
    for rows in slices:
        probs = torch.softmax(logits[rows], dim=-1)
        length, experts = probs.shape
        counts = torch.zeros(experts, dtype=torch.float64)
        for token in range(length):
            for i in sorted(range(experts), key=lambda i: -float(probs[token, i].detach()))[:chosen]:
                counts[i] += 1
        f = experts * counts / (length * (chosen if divide_by_chosen else 1))
        total = total + length * (f * probs.mean(0)).sum()
    return total


@pytest.mark.parametrize("aux_loss", ["sequence", "micro_batch"])
@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_the_balance_loss_and_its_gradient_follow_the_formula(aux_loss, router):
    model = small_model(*router, aux_loss=aux_loss, aux_loss_coef=0.25)
    seen, micro_batch = router_logits(model), collate(samples())
    out = model(micro_batch)
    sequence = aux_loss == "sequence"
    slices = documents_of(micro_batch) if sequence else [slice(None)]
    expected = sum(plain_aux(logits, slices, router[1], divide_by_chosen=sequence) for logits in seen)
    aux_sum, count = out.metrics["aux_loss"]
    assert int(count) == 144
    torch.testing.assert_close(aux_sum, expected.detach(), rtol=1e-12, atol=0)
    assert out.terms["aux_loss"].coefficient == 0.25
    torch.testing.assert_close(out.terms["aux_loss"].sum, expected, rtol=1e-12, atol=0)
    parameters = [p for name, p in model.named_parameters() if "gate.weight" in name or "embed" in name]
    ours = torch.autograd.grad(0.25 * out.terms["aux_loss"].sum, parameters, retain_graph=True, materialize_grads=True)
    for a, b in zip(ours, torch.autograd.grad(0.25 * expected, parameters, materialize_grads=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chosen", [1, 2])
def test_micro_batch_is_what_minimind_computes(chosen):
    """Its formula on one row of a batch: the load as a mean of one-hot rows for each choice, times E and the means."""
    model = small_model(4, chosen, aux_loss="micro_batch")
    seen, micro_batch = router_logits(model), collate(samples([40]))
    out = model(micro_batch)
    theirs = 0
    for logits in seen:
        scores = F.softmax(logits, dim=-1)
        load = F.one_hot(torch.topk(scores, chosen, dim=-1).indices, 4).double().mean(0)
        theirs += (load * scores.mean(0)).sum() * 4 * 5e-4
    torch.testing.assert_close(
        out.objective({"supervised": 1.0, "inputs": 40.0}) - out.loss_sum, theirs, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(("aux_loss", "expected"), [("sequence", 1.0), ("micro_batch", 2.0)])
def test_a_router_without_preference_has_the_balance_loss_of_an_even_load(aux_loss, expected):
    out = small_model(4, 2, spread=0.0, aux_loss=aux_loss)(collate(samples()))
    aux_sum, count = out.metrics["aux_loss"]
    assert float(aux_sum / count) == pytest.approx(3 * expected, rel=1e-12)  # over three layers


@pytest.mark.parametrize("chosen", [1, 2])
def test_expert_load_counts_choices(chosen):
    model = small_model(5, chosen)
    seen = router_logits(model)
    load, count = model(collate(samples())).metrics["expert_load"]
    assert load.shape == (3, 5)
    assert int(count) == 144 * chosen
    for row, logits in zip(load.tolist(), seen, strict=True):
        choices = [i for token in logits.topk(chosen).indices.tolist() for i in token]
        assert row == [choices.count(i) for i in range(5)]


SPLITS = ([[5, 0, 3], [1, 4, 2]], [[i] for i in range(6)], [[], [5, 4, 3, 2, 1, 0], []])


@pytest.mark.parametrize("aux_loss", ["sequence", "none"])
@pytest.mark.parametrize("chosen", [1, 2])
@pytest.mark.parametrize("coefficient", [5e-4, 1.0])
def test_however_a_step_is_split_its_gradient_is_the_same(aux_loss, chosen, coefficient):
    model, rows = small_model(4, chosen, aux_loss=aux_loss, aux_loss_coef=coefficient), samples()
    whole = step_gradients(model, [collate(rows)])
    for seats in SPLITS:
        split = step_gradients(model, [collate([rows[i] for i in chosen_rows]) for chosen_rows in seats])
        for name, grad in whole.items():
            assert (split[name] - grad).abs().max() <= 1e-10 * grad.abs().max(), name


def test_the_micro_batch_balance_loss_does_depend_on_the_split():
    """Documented: f and P are means over whatever shares the micro-batch."""
    model, rows = small_model(4, 1, aux_loss="micro_batch"), samples()
    whole = step_gradients(model, [collate(rows)])
    split = step_gradients(model, [collate([row]) for row in rows])
    routers = [name for name in whole if "mlp.gate" in name]
    assert max(float((split[n] - whole[n]).norm() / whole[n].norm()) for n in routers) > 1e-2
    model = small_model(4, 1, aux_loss="micro_batch", aux_loss_coef=1.0)
    whole, split = step_gradients(model, [collate(rows)]), step_gradients(model, [collate([row]) for row in rows])
    assert max(float((split[n] - whole[n]).abs().max()) for n in routers) > 1e-6


def test_the_balance_loss_counts_unsupervised_tokens_alike():
    model = small_model(aux_loss_coef=1.0)
    rows = samples()
    masked = [Sample(row.tokens, np.zeros(len(row), dtype=bool)) for row in rows]
    with torch.no_grad():
        sums = [float(model(collate(r)).terms["aux_loss"].sum) for r in (rows, masked)]
        assert sums[0] == sums[1] > 0


# The model


def test_initial_routers_and_experts_follow_from_the_seed_and_differ():
    first, again = (CausalLM(config_of(hidden_size=64, moe_intermediate_size=96), seed=5) for _ in range(2))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
        if "mlp" in name:
            expected = 0.02 / 6**0.5 if name.endswith("down_proj.weight") else 0.02
            assert float(weight.std()) == pytest.approx(expected, rel=0.15), name
    ups = [first.model.layers[layer].mlp.experts[i].up_proj.weight for layer in range(3) for i in range(4)]
    assert len({float(up.detach()[0, 0]) for up in ups}) == 12


@pytest.mark.parametrize("router", ROUTERS, ids=str)
def test_active_parameters_leave_out_the_experts_not_chosen(router):
    model = small_model(*router)
    experts, chosen, _ = router
    one = sum(p.numel() for p in model.model.layers[0].mlp.experts[0].parameters())
    assert model.num_parameters - model.num_active_parameters == 3 * (experts - chosen) * one
