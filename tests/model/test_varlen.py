"""Attention on CUDA without a GPU: the choice, the operator's arguments on fake tensors, and the numbers and gradients
of the same path with the kernel's definition standing in for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_reference import plain_gradients, plain_softmax_attention, qkv
from torch._subclasses import FakeTensorMode

from pertoken.data.batch.pack import Sample, collate
from pertoken.engines.torch_compile import CompileEngine
from pertoken.model import plain as plain_pass
from pertoken.model.attention import AttentionLayout, flash_capability, varlen_attention, which_attention
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.recipe.model import ModelConfig

pytestmark = pytest.mark.numeric
varlen = pytest.importorskip("torch.nn.attention.varlen", reason="PyTorch has it from 2.10 on")

CPU, A100, T4 = torch.device("cpu"), (8, 0), (7, 5)
LENGTHS = [(1,), (1, 1), (129, 7, 1), (5, 128, 31)]


@pytest.mark.parametrize(
    ("device_type", "dtype", "head_dim", "capability", "form"),
    [
        ("cuda", torch.bfloat16, 64, A100, "varlen"),
        ("cuda", torch.float16, 128, (12, 0), "varlen"),
        ("cuda", torch.bfloat16, 192, (9, 0), "varlen"),
        ("cuda", torch.bfloat16, 256, (9, 0), "rectangles"),
        ("cuda", torch.bfloat16, 20, A100, "rectangles"),
        ("cuda", torch.float32, 64, A100, "rectangles"),
        ("cuda", torch.float64, 64, A100, "rectangles"),
        ("cuda", torch.float16, 64, T4, "rectangles"),
        ("cuda", torch.bfloat16, 64, None, "rectangles"),  # no FlashAttention in this build
        ("cpu", torch.bfloat16, 64, None, "rectangles"),
        ("cpu", torch.bfloat16, 64, A100, "rectangles"),
    ],
)
def test_flash_attention_is_asked_for_what_it_can_do(device_type, dtype, head_dim, capability, form):
    assert which_attention(device_type, dtype, head_dim, capability) == form
    assert which_attention(device_type, dtype, head_dim, capability, 50.0) == "rectangles"


@pytest.mark.parametrize(
    ("available", "hip", "expected"), [(True, None, A100), (False, None, None), (True, "6.4", None)]
)
def test_the_capability_counts_only_where_the_build_has_the_kernel(available, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: available)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: A100)
    flash_capability.cache_clear()
    assert flash_capability(torch.device("cuda")) == expected
    assert flash_capability(CPU) is None
    flash_capability.cache_clear()


def cu_seqlens_of(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_nothing_is_padded_and_nothing_is_asked_of_the_device(lengths):
    with FakeTensorMode():  # where reading a value back, as a wait for the device would, is an error
        ends = torch.empty(len(lengths) + 1, dtype=torch.int32, device="cuda")
        layout = AttentionLayout.of(lengths, ends.device, cu_seqlens=ends)
    assert layout.cu_seqlens is ends
    assert (layout.rectangles, layout.positions, layout.padding_pairs) == ((), None, 0)
    assert (layout.max_length, layout.pairs) == (max(lengths), sum(t * t for t in lengths))


def test_an_empty_micro_batch_never_reaches_the_kernel():
    assert AttentionLayout.of((), CPU, cu_seqlens=cu_seqlens_of(())).cu_seqlens is None


# Autograd asks even a fake CUDA tensor's device for a stream, so gradients are output_rows of the meta device.
@pytest.mark.parametrize(("device", "with_grad"), [("cuda", False), ("meta", True)])
def test_the_operator_takes_our_arguments_forward_and_backward(device, with_grad):
    with FakeTensorMode(), torch.set_grad_enabled(with_grad):
        inputs = [
            torch.empty(12, heads, 64, device=device, dtype=torch.bfloat16, requires_grad=with_grad)
            for heads in (8, 2, 2)
        ]
        ends = torch.empty(4, dtype=torch.int32, device=device)
        out = varlen_attention(*inputs, layout=AttentionLayout.of((3, 4, 5), ends.device, cu_seqlens=ends))
        assert (out.shape, out.dtype, out.device.type) == ((12, 8, 64), torch.bfloat16, device)
        for x, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs) if with_grad else inputs, strict=True):
            assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


def check(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window_size):
    """What FlashAttention checks by itself, but for the dtype, so that float64 can show that nothing else differs."""
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert len(q) == len(k) == len(v) > 0
    assert q.shape[1] % k.shape[1] == 0
    for ends in (cu_q, cu_k):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert int(ends[-1]) == len(q)
    assert max_q == max_k == int(cu_q.diff().max()), "rows beyond it would be left out"
    assert is_causal
    assert list(window_size) == [-1, 0]
    assert scale is None


@pytest.fixture(scope="module")
def _kernel_on_cpu():
    """The operator's definition, and its gradient, as what it does on a CPU."""

    @varlen._varlen_attn.register_kernel("cpu")
    def forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None, gqa=False, *rest):
        check(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window_size)
        assert rest == (None, None, None) or not rest
        assert gqa or q.shape[1] == k.shape[1]
        lse = torch.empty(q.shape[1], q.shape[0])
        return (
            plain_softmax_attention(q, k, v, cu_q.diff().tolist()).contiguous(),
            lse,
            torch.zeros(2, dtype=torch.uint64),
        )

    @varlen._varlen_attn_backward.register_kernel("cpu")
    def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng, scale=None, window_size=None):
        check(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, scale, window_size)
        return tuple(x.contiguous() for x in plain_gradients(grad, q, k, v, cu_q.diff().tolist()))


@pytest.fixture
def _varlen(monkeypatch, _kernel_on_cpu):
    monkeypatch.setattr(plain_pass, "which_attention", lambda *_: "varlen")


@pytest.mark.usefixtures("_kernel_on_cpu")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_varlen_attention_and_its_gradients_are_exact_per_document(lengths, kv_heads):
    inputs = qkv(sum(lengths), kv_heads=kv_heads)
    layout = AttentionLayout.of(lengths, CPU, cu_seqlens=cu_seqlens_of(lengths))
    out, expected = varlen_attention(*inputs, layout=layout), plain_softmax_attention(*inputs, lengths)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    for got, want in zip(
        torch.autograd.grad((out * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def model(**changes):
    return CausalLM(ModelConfig(**SHAPE).resolve(50), seed=1, **changes)


def micro_batch(lengths):
    rng = np.random.default_rng(0)
    return collate([Sample(rng.integers(0, 50, n + 1), rng.random(n) < 0.6) for n in lengths])


def gradients(model, batch, dtype=None, execution=PLAIN):
    model.zero_grad()
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        out = model(batch, execution)
    out.objective({"supervised": 1.0, "inputs": 1.0}).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("lengths", [(9, 7, 1), (40, 3), ()], ids=str)
def test_the_model_is_the_same_with_either_form(lengths, request):
    ours, batch = model(dtype=torch.float64), micro_batch(lengths)
    rectangles = gradients(ours, batch)
    request.getfixturevalue("_varlen")
    torch.testing.assert_close(gradients(ours, batch), rectangles, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("_varlen")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_kernel_is_given_half_precision(dtype, monkeypatch):
    seen, real = [], varlen.varlen_attn

    def look(q, k, v, *args, **kwargs):
        seen.extend(x.dtype for x in (q, k, v))
        return real(q, k, v, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", look)
    assert gradients(model(), micro_batch((9, 7, 1)), dtype).isfinite().all()
    assert seen == [dtype] * 6


# Of the compiler's own doing, as in test_compile.py.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.usefixtures("_varlen")
def test_a_compiled_layer_is_one_graph_with_the_operator_inside():
    plain, ours = model(), model()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = Execution(CompileEngine(fullgraph=True, backend="aot_eager"))
    for lengths in ((9, 7, 2), (40, 3), (20, 20, 20, 8), (129,)):
        got = gradients(ours, micro_batch(lengths), execution=compiled)
        want = gradients(plain, micro_batch(lengths))
        assert (got - want).norm() <= 2e-6 * want.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * len(ours.layers)
