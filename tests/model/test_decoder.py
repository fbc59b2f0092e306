import numpy as np
import pytest
import torch

from pertoken.data.batch.pack import Sample, collate
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.recipe.model import ModelConfig

pytestmark = pytest.mark.numeric

SMALL = {
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "llama": {"family": "llama", "num_key_value_heads": 1, "tie_word_embeddings": False},
    "llama3": {
        "family": "llama",
        "rope_scaling": {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2": {"family": "qwen2", "num_key_value_heads": 2},
    "olmo2": {"family": "olmo2", "num_key_value_heads": 2},
    "granite": {
        "family": "granite",
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.3,
    },
    "gemma3": {"family": "gemma3", "head_dim": 12, "query_pre_attn_scalar": 5, "final_logit_softcapping": 0.7},
}


def small_model(family="qwen3", dtype=torch.float64, seed=0, **keys):
    config = ModelConfig(
        **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
        | SMALL[family]
        | keys
    )
    return CausalLM(config.resolve(61), dtype=dtype, seed=seed)


def samples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Sample(rng.integers(0, 61, n + 1), rng.random(n) < 0.5) for n in lengths]


def gradients(model, *micro_batches, execution=PLAIN):
    model.zero_grad()
    for micro_batch in micro_batches:
        model(micro_batch, execution).loss_sum.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", SMALL)
def test_however_samples_are_seated_sums_and_gradients_are_the_same(family):
    model, rows = small_model(family), samples([1, 7, 33, 34, 128, 129])
    one = gradients(model, collate(rows))
    for seating in ([[5, 0, 3], [1, 4, 2]], [[i] for i in range(6)], [[], [5, 4, 3, 2, 1, 0], []]):
        split = gradients(model, *(collate([rows[i] for i in seats]) for seats in seating))
        for name in one:
            torch.testing.assert_close(split[name], one[name], rtol=1e-10, atol=1e-12, msg=name)


def test_a_token_sees_its_own_document_up_to_itself_and_nothing_else():
    model, rows = small_model(), samples([9, 7, 8])
    before = model.hidden_states(collate(rows))
    tokens = rows[1].tokens.copy()
    tokens[3] = (tokens[3] + 1) % 61
    after = model.hidden_states(collate([rows[0], Sample(tokens, rows[1].loss_mask), rows[2]]))
    changed = (before - after).abs().amax(1) > 1e-12
    assert changed.tolist() == [False] * (9 + 3) + [True] * 4 + [False] * 8


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_an_empty_micro_batch_gives_zeros_and_touches_every_parameter(family, autocast):
    model = small_model(family, dtype=torch.float32)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out = model(collate([]))
    out.loss_sum.backward()
    assert (float(out.loss_sum.detach()), int(out.num_tokens)) == (0.0, 0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_activation_checkpointing_changes_no_gradient():
    model, micro_batch = small_model(dtype=torch.float32), collate(samples([5, 17, 16]))
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            plain = gradients(model, micro_batch)
            recomputed = gradients(model, micro_batch, execution=Execution(activation_checkpointing=True))
        for name in plain:
            assert torch.equal(plain[name], recomputed[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_linears_are_low_and_the_residual_stream_is_not(dtype):
    model = small_model(dtype=torch.float32)
    seen = {}
    for name, module in model.model.named_modules():
        module.register_forward_hook(lambda _m, _x, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", dtype=dtype):
        hidden = model.hidden_states(collate(samples([4, 9])))
    assert hidden.dtype == torch.float32
    blocks = {name for name in seen if name.rpartition(".")[2].isdigit()}
    norms = {name for name in seen if name.endswith("norm")}
    linears = {name for name in seen if name.endswith("_proj")}
    assert (len(blocks), len(norms), len(linears)) == (3, 3 * 4 + 1, 3 * 7)
    assert {seen[name] for name in blocks | norms} == {torch.float32}
    assert {seen[name] for name in linears} == {dtype}


@torch.no_grad()
def test_autocast_error_is_that_of_the_low_precision():
    model, micro_batch = small_model(), collate(samples([40, 33, 12]))
    exact = model.hidden_states(micro_batch)
    model.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model.hidden_states(micro_batch)
    assert float((low - exact).norm() / exact.norm()) < 2 * torch.finfo(torch.bfloat16).eps
    assert float((model.hidden_states(micro_batch) - exact).norm() / exact.norm()) < 1e-6


def test_initial_weights_follow_from_the_seed_alone():
    torch.manual_seed(1)
    first, state = small_model(seed=5), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "building a model drew from the global random state"
    torch.manual_seed(2)
    again, other, low = small_model(seed=5), small_model(seed=6), small_model(seed=5, dtype=torch.float32)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
        assert torch.equal(weight.float(), low.state_dict()[name]), name
        assert weight.ndim == 1 or not torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.parametrize("family", SMALL)
def test_initial_weights_have_the_documented_size(family):
    model = small_model(family, hidden_size=256, intermediate_size=512)
    for name, weight in model.state_dict().items():
        if name.endswith(".bias"):
            assert not weight.any(), name
        elif weight.ndim == 1:
            assert (weight == (0 if family == "gemma3" else 1)).all(), name
        else:
            expected = 0.02 / 6**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
            assert float(weight.std()) == pytest.approx(expected, rel=0.05), name


def test_num_parameters_counts_a_tied_head_once():
    tied, untied = small_model(), small_model(tie_word_embeddings=False)
    assert untied.num_parameters - tied.num_parameters == 61 * 32
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.head_weight is untied.lm_head.weight


@pytest.mark.parametrize("family", SMALL)
def test_decoding_with_a_cache_equals_the_training_forward(family):
    model = small_model(family)
    (row,) = samples([23])
    expected = model.logits(model.hidden_states(collate([row])))
    cache = model.new_cache(23)
    with torch.no_grad():
        for part in torch.from_numpy(row.input_ids).split([6, 1, 1, 9, 6]):
            logits = model.decode(part, cache)
            torch.testing.assert_close(logits, expected[cache.length - 1], rtol=1e-10, atol=1e-12)


def test_reference_loss_inside_the_model_equals_the_fast_one():
    model, micro_batch = small_model(), collate(samples([5, 17, 16]))
    plainly = Execution(loss_impl="reference")
    fast, plain = gradients(model, micro_batch), gradients(model, micro_batch, execution=plainly)
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], rtol=1e-10, atol=1e-12, msg=name)
