"""A GPU computes what a CPU computes: losses, gradients, splits, resumes.

Bounds are those of rounding: float32 on both sides, or half precision against float32.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from gpu_runs import SHORT, SIZES, assert_close, rows
from tiny import pertoken, rows_of

from pertoken import linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

KINDS = {
    "dense": {},
    "many micro-batches": {"train__micro_batch_tokens": 600},
    "experts": {"model__use_moe": True, "model__num_experts": 4, "model__aux_loss_coef": 0.1},
    "Muon": {"train__optimizer": "muon", "train__muon_learning_rate": 4e-3},
    "checkpointed activations": {"train__activation_checkpointing": True},
    "untied Llama": {"model__family": "llama", "model__tie_word_embeddings": False},
    "Qwen2": {"model__family": "qwen2"},
    "z-loss": {"train__z_loss_coef": 1e-2},
    "Adafactor": {"train__optimizer": "adafactor", "train__learning_rate": 1e-2},
    "Mistral, a window": {"model__family": "mistral", "model__sliding_window": 24},
    "Gemma 3, windows and capped logits": {
        "model__family": "gemma3",
        "model__sliding_window": 24,
        "model__query_pre_attn_scalar": 64,
        "model__final_logit_softcapping": 7.0,
    },
    "OLMo 2": {"model__family": "olmo2"},
    "SmolLM3": {"model__family": "smollm3", "model__no_rope_layers": [1, 0]},
    "Granite": {"model__family": "granite", "model__residual_multiplier": 0.5, "model__logits_scaling": 0.5},
    "a shared expert": {"model__family": "qwen2", "model__use_moe": True, "model__num_experts_per_tok": 2},
}
LOW = ["dense", "experts", "many micro-batches", "Mistral, a window", "Gemma 3, windows and capped logits"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_float32_computes_what_a_cpu_computes(world, tmp_path, kind):
    on_cpu = rows(world, tmp_path, "cpu", train__device="cpu", **KINDS[kind])
    on_gpu = rows(world, tmp_path, "gpu", train__device="cuda", **KINDS[kind])
    assert_close(on_gpu, on_cpu, 1e-3 if kind == "Muon" else 1e-4)  # Muon's iteration magnifies rounding
    assert math.isclose(on_gpu[-1]["eval_loss"], on_cpu[-1]["eval_loss"], rel_tol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", LOW)
def test_half_precision_stays_near_float32(world, tmp_path, kind, dtype):
    wide = rows(world, tmp_path, "wide", train__device="cuda", **KINDS[kind])
    low = rows(world, tmp_path, "low", train__device="cuda", train__dtype=dtype, **KINDS[kind])
    steps = [i for i, row in enumerate(low) if not row.get("skipped")]
    assert len(steps) >= 4
    if len(steps) == len(low):
        assert_close(low, wide, 3e-2, figures=("loss",))


def test_micro_batches_do_not_change_a_step_in_bfloat16(world, tmp_path):
    whole = rows(world, tmp_path, "whole", train__device="cuda", train__dtype="bfloat16")
    split = rows(world, tmp_path, "split", train__device="cuda", train__dtype="bfloat16", train__micro_batch_tokens=600)
    assert split[0]["micro_batches"] > whole[0]["micro_batches"]
    assert_close(split, whole, 1e-2)


def test_compiled_layers_compute_what_plain_ones_do(world, tmp_path):
    plain = rows(world, tmp_path, "plain", train__device="cuda", train__engine="plain")
    compiled = rows(world, tmp_path, "compiled", train__device="cuda", train__engine="compile")
    assert_close(compiled, plain, 1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_resumed_run_has_the_rows_of_one_that_was_not_stopped(world, tmp_path, dtype):
    through = rows(world, tmp_path, "through", train__device="cuda", train__dtype=dtype)
    recipe = world.write_recipe(tmp_path / "again", **(SIZES | SHORT), train__device="cuda", train__dtype=dtype)
    assert pertoken("train", recipe)[0] == 0
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000008")
    code, out, err = pertoken("train", recipe, "--resume")
    assert code == 0, out + err
    assert_close(rows_of(tmp_path / "again"), through, 1e-5 if dtype == "float32" else 1e-2, figures=("loss",))


def test_memory_that_ends_halves_the_micro_batch_and_loses_nothing(world, tmp_path):
    big = {"model__hidden_size": 512, "model__num_hidden_layers": 8, "model__intermediate_size": 1024}
    big |= {
        "train__device": "cuda",
        "train__batch_size": 64,
        "train__max_steps": 3,
        "train__micro_batch_tokens": 100_000,
    }
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = rows(world, tmp_path, "before", **big)
    peak, total = torch.cuda.max_memory_reserved(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    try:
        recipe = world.write_recipe(tmp_path / "little", **(SIZES | SHORT | big))
        code, out, err = pertoken("train", recipe)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 0, out + err
    assert "halved" in out + err
    assert_close(rows_of(tmp_path / "little"), before, 1e-4)


@pytest.mark.parametrize("impl", ["chunked", "liger", "cce"])
def test_every_implementation_of_the_head_agrees_with_the_reference(impl):
    if impl != "chunked":
        pytest.importorskip({"liger": "liger_kernel", "cce": "cut_cross_entropy"}[impl])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 64, generator=generator).cuda().bfloat16()
    weight = (torch.randn(5003, 64, generator=generator) * 0.3).cuda().bfloat16()
    labels = torch.randint(5003, (700,), generator=generator).cuda()
    mask = (torch.rand(700, generator=generator) < 0.4).cuda()

    def gradients(impl, dtype):
        x, w = (t.detach().clone().to(dtype).requires_grad_() for t in (hidden, weight))
        out = linear_cross_entropy(x, w, labels, mask, impl=impl)
        out.loss_sum.backward()
        return out.loss_sum.double(), x.grad.double(), w.grad.double()

    exact = gradients("reference", torch.float64)
    low = gradients("reference", torch.bfloat16)
    ours = gradients(impl, torch.bfloat16)
    for truth, reference, found in zip(exact, low, ours, strict=True):
        error, allowed = (found - truth).abs().max(), (reference - truth).abs().max()
        bound = 4 * allowed + 1e-3 * truth.abs().max()
        if impl == "cce":  # 25.1.1 adds gradients up in bfloat16, block by block of the vocabulary: half an ulp each
            bound = 5003 / 128 * 2**-9 * truth.abs().max()
        assert error <= bound, (impl, float(error), float(allowed))


def test_fsdp2_and_ddp_on_one_gpu_are_a_plain_run(world, tmp_path):
    plain = rows(world, tmp_path, "plain", train__device="cuda")
    for how in ("ddp", "fsdp"):
        recipe = world.write_recipe(tmp_path / how, **(SIZES | SHORT), train__device="cuda", train__parallel=how)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        ended = subprocess.run(
            [*command, "-m", "pertoken", "train", str(recipe)], capture_output=True, text=True, env=dict(os.environ)
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert_close(rows_of(tmp_path / how), plain, 1e-4)


def test_a_model_answers_alike_on_both(world, tmp_path):
    rows(world, tmp_path, "run", train__device="cuda")
    answers = []
    for device in ("cpu", "cuda"):
        found = tmp_path / f"{device}.json"
        code, out, err = pertoken(
            "eval", tmp_path / "run", world.folder / "held-out.jsonl", "--device", device, "--json", found
        )
        assert code == 0, out + err
        answers.append(json.loads(found.read_text())["loss"])
    assert np.isclose(*answers, rtol=1e-5)
