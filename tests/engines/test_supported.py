"""The kernels run what they know and nothing else: whatever a user has changed in a model runs plain, and is named."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pertoken.data.batch.pack import MicroBatch, Sample, collate
from pertoken.engines.choose import choose_engine
from pertoken.engines.cpu.engine import CpuEngine
from pertoken.engines.cpu.supported import unsupported
from pertoken.errors import RecipeError
from pertoken.kernels.ops import Kernels
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.recipe.model import ModelConfig
from pertoken.training.faults import first_non_finite
from pertoken.training.precision import Precision

pytestmark = pytest.mark.numeric

VOCAB = 61
CPU = torch.device("cpu")
FLOAT32 = Precision("float32", CPU)


def model_of(dtype: torch.dtype = torch.float32, **changes: Any) -> CausalLM:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return CausalLM(ModelConfig(**{**shape, **changes}).resolve(VOCAB), dtype=dtype)


def micro_batch() -> MicroBatch:
    rng = np.random.default_rng(0)
    return collate([Sample(rng.integers(0, VOCAB, n + 1), rng.random(n) < 0.5) for n in (17, 9, 4)])


class Adapter(nn.Module):
    """As peft's: around a linear layer, whose weight it shows as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.full((2, base.in_features), 0.3, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.full((base.out_features, 2), 0.2, dtype=base.weight.dtype))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.down.T @ self.up.T
        return out


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced(model: CausalLM) -> None:
    model.model.layers[0].self_attn.q_proj = Adapter(model.model.layers[0].self_attn.q_proj)


def replaced_head(model: CausalLM) -> None:
    model.lm_head = Adapter(model.lm_head)


def subclassed(model: CausalLM) -> None:
    model.model.layers[1].mlp.up_proj.__class__ = OwnLinear


def biased(model: CausalLM) -> None:
    k_proj = model.model.layers[1].self_attn.k_proj
    k_proj.bias = nn.Parameter(torch.linspace(-1, 1, k_proj.out_features))


def biased_head(model: CausalLM) -> None:
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, VOCAB, dtype=model.lm_head.weight.dtype))


def parametrized(model: CausalLM) -> None:
    parametrize.register_parametrization(model.model.layers[0].mlp.down_proj, "weight", Doubled())


def own_forward(model: CausalLM) -> None:
    gate = model.model.layers[0].mlp.gate_proj
    gate.forward = lambda x: 3 * nn.Linear.forward(gate, x)


def forward_hook(model: CausalLM) -> None:
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, out: 2 * out)


def forward_pre_hook(model: CausalLM) -> None:
    model.model.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hook_on_the_head(model: CausalLM) -> None:
    model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)


def backward_hook(model: CausalLM) -> None:
    model.model.layers[0].mlp.register_full_backward_hook(lambda module, d_in, d_out: (2 * d_in[0],))


def backward_pre_hook(model: CausalLM) -> None:
    model.model.layers[0].self_attn.o_proj.register_full_backward_pre_hook(lambda module, d_out: (2 * d_out[0],))


def hook_on_a_block(model: CausalLM) -> None:
    model.model.layers[0].register_forward_hook(lambda module, args, out: 2 * out)


def hook_on_the_embedding(model: CausalLM) -> None:
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: 2 * out)


def another_eps(model: CausalLM) -> None:
    model.model.layers[0].input_layernorm.eps = 0.1


def scaled_embedding(model: CausalLM) -> None:
    model.model.embed_tokens.scale_grad_by_freq = True


def no_weight_in_a_norm(model: CausalLM) -> None:
    model.model.layers[0].post_attention_layernorm = nn.RMSNorm(32, eps=1e-6, elementwise_affine=False)


def norm_with_gaps(model: CausalLM) -> None:
    model.model.norm.weight = nn.Parameter(torch.linspace(0, 1, 64)[::2])


CHANGES: dict[Callable[[CausalLM], None], str] = {
    replaced: "model.layers.0.self_attn.q_proj is a Adapter",
    replaced_head: "lm_head is a Adapter",
    subclassed: "model.layers.1.mlp.up_proj is a OwnLinear",
    biased: "model.layers.1.self_attn.k_proj has a bias",
    biased_head: "lm_head has a bias",
    parametrized: "model.layers.0.mlp.down_proj is parametrized",
    own_forward: "model.layers.0.mlp.gate_proj has a forward of its own",
    forward_hook: "model.layers.0.self_attn.v_proj has a forward hook",
    forward_pre_hook: "model.norm has a forward pre-hook",
    hook_on_the_head: "lm_head has a forward hook",
    backward_hook: "model.layers.0.mlp has a backward hook",
    backward_pre_hook: "model.layers.0.self_attn.o_proj has a backward pre-hook",
    hook_on_a_block: "model.layers.0 has a forward hook",
    hook_on_the_embedding: "model.embed_tokens has a forward hook",
    another_eps: "model.layers.0.input_layernorm has an eps of 0.1, not 1e-06",
    scaled_embedding: "model.embed_tokens does more than look rows up",
    no_weight_in_a_norm: "model.layers.0.post_attention_layernorm has no weight of its own",
    norm_with_gaps: "model.norm has a weight that is not contiguous",
}


def gradients(model: CausalLM, execution: Execution = PLAIN) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(micro_batch(), execution)
    out.objective({"supervised": 10.0, "inputs": 30.0}).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": out.loss_sum.detach()}


def kernels() -> Execution:
    return Execution(CpuEngine(torch.float32))


def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels called from here on."""
    calls: list[str] = []
    real = Kernels._call

    def noted(self: Kernels, name: str, *arguments: Any, **settings: Any) -> None:
        calls.append(name)
        real(self, name, *arguments, **settings)

    monkeypatch.setattr(Kernels, "_call", noted)
    return calls


@pytest.mark.parametrize(("change", "why"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_a_changed_model_gives_what_its_plain_modules_give_and_is_named(change, why, monkeypatch):
    """Changed after kernels were allowed, and after they have run: bitwise the plain modules, since it is them."""
    model = model_of(tie_word_embeddings=False)
    plain = copy.deepcopy(model)
    calls, by_kernels = kernel_calls(monkeypatch), kernels()
    assert unsupported(model) is None
    unchanged = gradients(model, by_kernels)
    assert calls
    change(model)
    change(plain)
    calls.clear()
    assert unsupported(model) == why
    found, expected = gradients(model, by_kernels), gradients(plain)
    assert calls == []
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], g) for name, g in expected.items())
    assert any(not torch.allclose(g, unchanged[name]) for name, g in expected.items() if name in unchanged)


NORMS_OF_HEADS: dict[str, Callable[[], nn.Module]] = {
    "is a LayerNorm": lambda: nn.LayerNorm(8),
    "has an eps of 1.0, not 1e-06": lambda: nn.RMSNorm(8, eps=1.0),
    "has a weight of (1,), not (8,)": lambda: nn.RMSNorm(1, eps=1e-6),
}


@pytest.mark.parametrize("why", NORMS_OF_HEADS)
def test_a_norm_of_heads_in_a_family_that_has_none_is_seen(why):
    model = model_of(family="llama")
    assert unsupported(model) is None
    model.model.layers[1].self_attn.k_norm = NORMS_OF_HEADS[why]()
    assert unsupported(model) == f"model.layers.1.self_attn.k_norm {why}"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda attention: setattr(attention.v_proj, "bias", None), "v_proj has no bias of its own"),
        (
            lambda attention: setattr(attention.k_proj, "bias", nn.Parameter(torch.zeros(1))),
            "k_proj has a bias of (1,)",
        ),
        (lambda attention: setattr(attention.o_proj, "bias", nn.Parameter(torch.zeros(32))), "o_proj has a bias"),
        (lambda attention: attention.q_proj.bias.data.fill_(3.0), None),
    ],
    ids=["missing", "of another shape", "where none belongs", "another value"],
)
def test_a_bias_is_expected_where_the_family_has_one_and_nowhere_else(change, why):
    model = model_of(family="qwen2")
    assert unsupported(model) is None
    change(model.model.layers[1].self_attn)
    assert (unsupported(model) or "").startswith(f"model.layers.1.self_attn.{why}" if why else "")


def test_what_the_head_becomes_is_what_the_loss_is_of():
    """The loss reads the head's weight, unless there is more to it."""
    model = model_of(torch.float64, tie_word_embeddings=False)
    batch = micro_batch()
    for change in (replaced_head, biased_head, hook_on_the_head):
        changed = copy.deepcopy(model)
        change(changed)
        logits = changed.lm_head(changed.hidden_states(batch))
        nll = -logits.log_softmax(-1)[torch.arange(len(batch.labels)), batch.labels]
        torch.testing.assert_close(changed(batch).loss_sum, (nll * batch.loss_mask).sum())
        torch.testing.assert_close(changed.logits(changed.hidden_states(batch)), logits)


def test_a_hook_on_all_modules_is_seen(monkeypatch):
    model, calls = model_of(), kernel_calls(monkeypatch)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        assert unsupported(model) == "torch.nn has a hook on all modules"
        model(micro_batch(), kernels())
    finally:
        handle.remove()
    assert model.model.layers[0].self_attn.q_proj in seen
    assert calls == []
    model(micro_batch(), kernels())
    assert calls != []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_one_matrix_in_another_dtype_is_seen(dtype):
    model = model_of()
    model.model.layers[1].mlp.down_proj.to(dtype)
    name = str(dtype).removeprefix("torch.")
    assert unsupported(model) == f"model.layers.1.mlp.down_proj is in {name}, not in float32"


def test_a_matrix_of_another_shape_or_device_is_seen():
    model = model_of()
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(32, 7))
    assert unsupported(model).startswith("model.layers.1.mlp.down_proj has a weight of (32, 7), not (32, ")
    model.model.layers[1].mlp.down_proj.to("meta")
    assert unsupported(model) == "model.layers.1.mlp.down_proj is on meta, not on the CPU"


def test_a_subclass_is_not_taken_for_the_decoder():
    class Mine(CausalLM):
        pass

    model = model_of()
    model.__class__ = Mine
    assert unsupported(model) == "the model is a Mine"


def test_heads_too_wide_for_the_kernels_are_named():
    assert unsupported(model_of(num_attention_heads=1, num_key_value_heads=1, head_dim=1026)).startswith(
        "head_dim is 1026"
    )


def test_experts_run_plain_and_may_be_changed(monkeypatch):
    model = model_of(use_moe=True, num_experts=4, num_experts_per_tok=2)
    expert = model.model.layers[0].mlp.experts[0]
    expert.up_proj = Adapter(expert.up_proj)
    assert unsupported(model) is None
    calls = kernel_calls(monkeypatch)
    assert "model.layers.0.mlp.experts.0.up_proj.down" in gradients(model, kernels())
    assert calls != []


def test_a_hook_on_the_model_itself_leaves_the_kernels_in_use(monkeypatch):
    """It is called either way."""
    model, calls, seen = model_of(), kernel_calls(monkeypatch), []
    model.register_forward_hook(lambda module, args, out: seen.append(module))
    model(micro_batch(), kernels())
    assert seen == [model]
    assert calls != []


def test_the_start_says_why_and_cpu_refuses():
    model = model_of()
    replaced(model)
    choice = choose_engine(model, "auto", dtype="float32", device=CPU, total_steps=10)
    why = "model.layers.0.self_attn.q_proj is a Adapter"
    assert (choice.compiled, choice.engine, choice.note) == (False, "plain", why)
    assert choice.remark == f"training without compiled kernels, several times slower: {why}"
    with pytest.raises(RecipeError, match=rf'train\.engine="cpu": {why}; set it to "auto" or "plain"'):
        choose_engine(model, "cpu", dtype="float32", device=CPU, total_steps=10)


def test_two_layers_that_share_one_projection_keep_their_own_others():
    """What is cast once a step is remembered by all the matrices it is made of."""
    model = model_of()
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj = first.q_proj
    plain = copy.deepcopy(model)
    with kernels().keeping_casts() as keeping:
        found = gradients(model, keeping)
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_of_a_gradient_is_refused():
    """The gradients by hand have none of their own, which would be left out of the sum without a word."""
    model = model_of()
    refused = {"match": "no gradient of their gradient"}
    weight, batch = model.model.norm.weight, micro_batch()
    for execution in (PLAIN, kernels(), replace(kernels(), loss_impl="reference")):
        with pytest.raises(RuntimeError, **refused):
            torch.autograd.grad(model(batch, execution).loss_sum, weight, create_graph=True)
    loss_sum = model(batch, Execution(loss_impl="reference")).loss_sum
    (grad,) = torch.autograd.grad(loss_sum, model.model.norm.weight, create_graph=True)
    grad.square().sum().backward()
    assert torch.count_nonzero(model.model.norm.weight.grad)


def test_the_report_of_what_is_not_finite_does_not_need_all_logits(monkeypatch):
    """Its hooks make modules be called; the head's output would be a [tokens, vocabulary] matrix."""
    monkeypatch.setattr("pertoken.model.decoder.cross_entropy", None)
    model = model_of(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    found = first_non_finite(model, micro_batch(), FLOAT32)
    assert found.startswith("the output of model.layers.1.mlp.up_proj")


SHARDED = """
import sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
sys.path.insert(0, sys.argv[3])
from test_supported import gradients, kernels, micro_batch, model_of
from pertoken.engines.cpu.supported import unsupported
from pertoken.kernels.ops import Kernels
from pertoken.training.parallel import World, parallelize, whole

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
calls, real = [], Kernels._call
Kernels._call = lambda *args, **settings: calls.append(args[1]) or real(*args, **settings)
expected = gradients(model_of())
for how in ("ddp", "fsdp"):
    model = model_of()
    wrapped = parallelize(model, how, World(rank, 2, rank), device=torch.device("cpu"), layers=model.layers)
    assert unsupported(model) is None, unsupported(model)
    calls.clear()
    out = wrapped(micro_batch(), kernels())
    assert "softmax_forward" in calls, how
    out.objective({"supervised": 10.0, "inputs": 30.0}).backward()
    assert "softmax_backward" in calls, how
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole(parameter.grad), expected[name], rtol=1e-4, atol=1e-6)
    model.zero_grad()
    handle = model.model.layers[1].register_forward_hook(lambda module, args, out: None)
    assert unsupported(model) == "model.layers.1 has a forward hook", unsupported(model)
    calls.clear()
    wrapped(micro_batch(), kernels()).loss_sum.backward()
    assert calls == [], how
    handle.remove()
    assert unsupported(model) is None
mesh, low = DeviceMesh.from_group(dist.group.WORLD, "cpu"), MixedPrecisionPolicy(torch.bfloat16)
model = model_of()
fully_shard(model.model.layers[0], mesh=mesh, mp_policy=low)
assert unsupported(model) == "model.layers.0 is gathered by FSDP2 in torch.bfloat16", unsupported(model)
dist.barrier()
dist.destroy_process_group()
"""


def test_ddp_and_fsdp2_run_through_the_kernels_and_a_user_s_hook_beside_theirs_does_not(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = str(Path(__file__).parent)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, str(tmp_path / "rendezvous"), str(rank), here],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], said
