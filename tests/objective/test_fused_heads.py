"""The extras for the head: how they are called, what they refuse, and their numbers where they can run.

Liger runs without a GPU under TRITON_INTERPRET=1, cut-cross-entropy in its torch.compile form; both need triton.
"""

from __future__ import annotations

import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from loss_cases import autocast_errors, plain, problem
from tiny import pertoken
from torch._subclasses import FakeTensorMode

from pertoken import linear_cross_entropy
from pertoken.errors import RecipeError
from pertoken.objective.fused_heads import _kernel, fused_loss_sum, require_head
from pertoken.objective.logit_map import LogitMap

pytestmark = pytest.mark.numeric

LIGER, CCE = "liger_kernel.ops.fused_linear_cross_entropy", "cut_cross_entropy"


@pytest.fixture(autouse=True)
def _asked_anew():
    _kernel.cache_clear()
    yield
    _kernel.cache_clear()


class Liger:
    """Liger's function: the sum, in float32, of all rows but those with its ignored label."""

    @staticmethod
    def apply(x, w, labels, *rest):
        (cap,) = rest[6:7]
        assert rest == (None, None, -100, 0.0, 0.0, "sum", cap, False, torch.float32), rest
        assert x.dtype == w.dtype
        if not x.requires_grad:  # it then forms no gradient at all, of the weight neither
            w = w.detach()
        logits = (x @ w.T).float()
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        return F.cross_entropy(logits, labels, reduction="sum"), None, None, None


def cut(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"):
    assert filter_eps is None, "it would leave gradients out"
    assert (reduction, impl) == ("none", "torch_compile")
    assert e.dtype == c.dtype
    logits = (e @ c.T).float()
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.fixture
def _stand_ins(monkeypatch):
    """In place of both packages: the definition, which checks how it is called."""
    for name, member, value in (
        (LIGER, "LigerFusedLinearCrossEntropyFunction", Liger),
        (CCE, "linear_cross_entropy", cut),
    ):
        for parent in (name.rsplit(".", i)[0] for i in range(name.count("."), 0, -1)):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        module = types.ModuleType(name)
        setattr(module, member, value)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("impl", "weights"), [("liger", False), ("cce", False), ("cce", True)])
def test_the_contract_holds_whoever_computes(impl, weights, share):
    hidden, weight, labels, mask = problem(129, 16, 33, share, torch.float32, weights=weights)
    labels = torch.where(mask != 0, labels, -7)  # never looked at
    out, ours = (linear_cross_entropy(hidden, weight, labels, mask, impl=i) for i in (impl, "auto"))
    assert out.loss_sum.dtype == torch.float32
    torch.testing.assert_close(out.loss_sum, ours.loss_sum)
    torch.testing.assert_close(out.num_tokens, ours.num_tokens, rtol=0, atol=0)
    for a, b in zip(*(torch.autograd.grad(o.loss_sum * 0.37, (hidden, weight)) for o in (out, ours)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("impl", ["liger", "cce"])
def test_a_scale_and_a_soft_cap_reach_them(impl):
    hidden, weight, labels, mask = problem(129, 16, 33, 0.4, torch.float32)
    out, ours = (
        linear_cross_entropy(hidden, weight, labels, mask, impl=i, logit_map=LogitMap(0.5, 2.0)) for i in (impl, "auto")
    )
    torch.testing.assert_close(out.loss_sum, ours.loss_sum)
    for a, b in zip(*(torch.autograd.grad(o.loss_sum, (hidden, weight)) for o in (out, ours)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("impl", ["liger", "cce"])
def test_gradients_reach_a_head_over_frozen_hidden_states(impl):
    hidden, weight, labels, mask = problem(7, 16, 33, 1.0, torch.float32)
    grads = [
        torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, labels, mask, impl=i).loss_sum, weight)[0]
        for i in (impl, "auto")
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("impl", ["liger", "cce"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_they_are_given_its_dtype_and_return_float32(impl, dtype, monkeypatch):
    seen = []
    module, member = (LIGER, "LigerFusedLinearCrossEntropyFunction") if impl == "liger" else (CCE, None)
    kernel = Liger.apply if member else cut

    def look(x, w, *args, **kwargs):
        seen.extend((x.dtype, w.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(x, w, *args, **kwargs)

    look_class = types.SimpleNamespace(apply=look)
    monkeypatch.setattr(sys.modules[module], member or "linear_cross_entropy", look_class if member else look)
    hidden, weight, labels, mask = problem(7, 16, 33, 1.0, torch.float32)
    with torch.autocast("cpu", dtype):
        out = linear_cross_entropy(hidden, weight, labels, mask, impl=impl)
    assert seen == [dtype, dtype, False]
    assert out.loss_sum.dtype == torch.float32
    assert {g.dtype for g in torch.autograd.grad(out.loss_sum, (hidden, weight))} == {torch.float32}


@pytest.mark.usefixtures("_stand_ins")
def test_cut_cross_entropy_accumulates_in_float32_on_cuda_where_it_can(monkeypatch):
    asked = {}

    def newer(e, c, targets, reduction, filter_eps, impl, accum_e_fp32=False, accum_c_fp32=False):
        asked.update(impl=impl, e=accum_e_fp32, c=accum_c_fp32)
        return torch.zeros(len(targets))

    monkeypatch.setattr(sys.modules[CCE], "linear_cross_entropy", newer)
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, 8, dtype=torch.bfloat16, device="cuda") for n in (3, 5))
        labels = torch.empty(3, dtype=torch.int64, device="cuda")
        fused_loss_sum("cce", hidden, weight, labels, None, torch.bfloat16)
    assert asked == {"impl": "cce", "e": True, "c": True}


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "interpreted", "problem"),
    [
        ("liger", "cpu", torch.bfloat16, False, "runs on CUDA alone"),
        ("liger", "cpu", torch.bfloat16, True, None),
        ("liger", "cuda", torch.float32, False, None),
        ("liger", "cuda", torch.float64, False, "dtype is float64"),
        ("cce", "cuda", torch.float32, False, "dtype is float32"),
        ("cce", "cuda", torch.float16, False, None),
        ("cce", "cpu", torch.float32, False, None),
        ("cce", "cpu", torch.float64, False, "dtype is float64"),
    ],
)
def test_what_they_cannot_compute_is_said_before_the_first_step(impl, device, dtype, interpreted, problem, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", str(int(interpreted)))
    if problem is None:
        require_head(impl, device, dtype)
        return
    with pytest.raises(RecipeError, match=f'^train.loss_impl="{impl}": .*{problem}'):
        require_head(impl, device, dtype)


@pytest.mark.usefixtures("_stand_ins")
def test_liger_refuses_float_weights():
    hidden, weight, labels, mask = problem(7, 16, 33, 1.0, torch.float32, weights=True)
    with pytest.raises(RecipeError, match="no float loss weights"):
        linear_cross_entropy(hidden, weight, labels, mask, impl="liger")


@pytest.mark.parametrize(("impl", "module"), [("liger", "liger_kernel"), ("cce", CCE)])
def test_an_extra_that_is_not_installed_says_what_to_install(world, tmp_path, impl, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    recipe = world.write_recipe(tmp_path / "run", train__max_steps=3, train__loss_impl=impl)
    code, _, err = pertoken("train", recipe)
    assert code == 2
    assert f'pip install "pertoken[{impl}]"' in err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("impl", ["liger", "cce"])
def test_a_recipe_reaches_them_and_may_change_them_on_resume(world, tmp_path, impl, monkeypatch):
    used = []
    real = fused_loss_sum

    def noted(name, *args, **keys):
        used.append(name)
        return real(name, *args, **keys)

    monkeypatch.setattr("pertoken.objective.cross_entropy.fused_loss_sum", noted)
    recipe = world.write_recipe(tmp_path / "run", train__max_steps=2, train__loss_impl=impl)
    assert pertoken("train", recipe)[0] == 0
    assert set(used) == {impl}
    used.clear()
    code, _, err = pertoken("train", recipe, "--resume", "train.max_steps=3", "train.loss_impl=auto")
    assert code == 0, err
    assert not used


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of their imports and of the compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler's, as in test_compile.py
@pytest.mark.parametrize("impl", ["liger", "cce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_real_ones_err_no_more_than_the_reference_does(impl, dtype, share):
    if impl == "liger" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Liger's kernel needs CUDA or TRITON_INTERPRET=1")
    if impl == "liger" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16, where a GPU rounds")
    pytest.importorskip(LIGER if impl == "liger" else CCE, exc_type=ImportError)
    if dtype == torch.float32:
        hidden, weight, labels, mask = problem(513, 64, 777, share, dtype)
        with torch.no_grad():
            weight.mul_(0.1)
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        wanted = torch.autograd.grad(plain(*exact, labels, mask), exact)
        errors = {}
        for name in (impl, "reference"):
            out = linear_cross_entropy(hidden, weight, labels, mask, impl=name)
            grads = torch.autograd.grad(out.loss_sum, (hidden, weight))
            errors[name] = [float((g - w).norm() / w.norm()) for g, w in zip(grads, wanted, strict=True)]
        ours, theirs = errors[impl], errors["reference"]
    else:
        ours, theirs = autocast_errors(dtype, impl, share), autocast_errors(dtype, "reference", share)
    for a, b in zip(ours, theirs, strict=True):
        assert a <= 1.5 * b + 1e-6
