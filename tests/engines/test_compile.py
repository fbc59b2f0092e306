"""torch.compile changes nothing but speed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pertoken.data.batch.pack import Sample, collate
from pertoken.engines.torch_compile import CompileEngine
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.recipe.model import ModelConfig

pytestmark = pytest.mark.numeric


# Both are of the compiler's own doing: what it imports, and that it looks at `.grad` of what it traces.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_moe": True, "num_experts_per_tok": 2},
        {"family": "granite", "residual_multiplier": 0.7},
        {"family": "gemma3"},
    ],
    ids=["dense", "experts", "granite", "gemma3"],
)
def test_compiled_layers_give_the_same_loss_and_gradients_at_any_number_of_tokens(changes):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = ModelConfig(**shape, **changes)
    models = [CausalLM(config.resolve(50), seed=1) for _ in range(2)]
    executions = [PLAIN, Execution(CompileEngine())]
    rng = np.random.default_rng(0)
    for lengths in ([7, 5], [64, 64, 3], [129]):
        micro_batch = collate([Sample(rng.integers(0, 50, n + 1), rng.random(n) < 0.6) for n in lengths])
        for model, execution in zip(models, executions, strict=True):
            model.zero_grad()
            model(micro_batch, execution).objective({"supervised": 1.0, "inputs": 1.0}).backward()
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (a.grad - b.grad).norm() <= 2e-6 * a.grad.norm(), name
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
