"""`pertoken prove` of a recipe for a GPU."""

from __future__ import annotations

import json

import pytest
import torch
from gpu_runs import SIZES
from tiny import pertoken

from pertoken.prove.run import NAMES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ON_DEVICE = [name for name in NAMES if name.startswith("on the device")]
KINDS = {
    "dense": {},
    "experts": {"model__use_moe": True, "model__num_experts": 4, "model__num_experts_per_tok": 2},
    "gemma3": {"model__family": "gemma3", "model__sliding_window": 24, "model__final_logit_softcapping": 7.0},
    "z-loss": {"train__z_loss_coef": 1e-2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(world, tmp_path, kind):
    path = world.write_recipe(tmp_path / "run", **(SIZES | {"train__device": "cuda"} | KINDS[kind]))
    only = [part for name in ON_DEVICE for part in ("--only", name)]
    code, out, err = pertoken("prove", path, *only, "--json", tmp_path / "proof.json")
    print(out)
    assert (code, err) == (0, ""), out
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert [(r["name"], r["verdict"]) for r in proof["results"]] == [(name, "passed") for name in ON_DEVICE]
    exact = next(r for r in proof["results"] if r["dtype"] == "float64")
    assert exact["gradient_error"] <= 1e-10
