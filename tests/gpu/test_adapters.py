"""LoRA on a GPU: what a CPU computes, with frozen weights in float32 and in bfloat16, resumed, opened by peft."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import SHORT, SIZES, assert_close, rows
from tiny import World, pertoken, rows_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LORA: dict[str, Any] = {"adapter__kind": "lora", "adapter__r": 8, "train__learning_rate": 1e-2}


@pytest.fixture(scope="module")
def base(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to adapt."""
    folder = tmp_path_factory.mktemp("base")
    rows(world, folder, "run", train__device="cpu")
    return folder / "run"


def adapted(world: World, tmp_path: Path, name: str, base: Path, **changes: Any) -> list[dict[str, Any]]:
    recipe = world.recipe(tmp_path / name, **(SHORT | LORA | {"model": {}, "init_from": str(base)} | changes))
    path = (tmp_path / name).with_suffix(".toml")
    path.write_text(recipe.to_toml())
    code, out, err = pertoken("train", path)
    assert code == 0, out + err
    return rows_of(tmp_path / name)


@pytest.mark.parametrize("kind", ["plain", "compile"])
def test_an_adapter_learns_what_it_learns_on_a_cpu(world, tmp_path, base, kind):
    on_cpu = adapted(world, tmp_path, "cpu", base, train__device="cpu")
    on_gpu = adapted(world, tmp_path, "gpu", base, train__device="cuda", train__engine=kind)
    assert on_cpu[-1]["loss"] < on_cpu[0]["loss"]
    assert_close(on_gpu, on_cpu, 1e-4)


@pytest.mark.parametrize("engine", ["plain", "compile"])
@pytest.mark.parametrize("frozen", ["float32", "bfloat16"])
def test_half_precision_stays_near_float32(world, tmp_path, base, frozen, engine):
    wide = adapted(world, tmp_path, "wide", base, train__device="cuda")
    low = {"train__device": "cuda", "train__dtype": "bfloat16", "train__engine": engine}
    assert_close(adapted(world, tmp_path, "low", base, **low, model={"frozen_dtype": frozen}), wide, 3e-2, ("loss",))


def test_an_adapter_resumes_as_if_it_had_not_stopped(world, tmp_path, base):
    keys = {"train__device": "cuda", "train__dtype": "bfloat16", "model": {"frozen_dtype": "bfloat16"}}
    through = adapted(world, tmp_path, "through", base, **keys)
    adapted(world, tmp_path, "again", base, **keys)
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000008")
    code, out, err = pertoken("train", tmp_path / "again.toml", "--resume")
    assert code == 0, out + err
    assert_close(rows_of(tmp_path / "again"), through, 1e-2, ("loss",))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_frozen_weights_in_bfloat16_take_half_the_memory(world, tmp_path, base):
    from pertoken import load_model
    from pertoken.model.lora import keep_frozen_in

    model = load_model(base).cuda()
    model.requires_grad_(False)
    before = torch.cuda.memory_allocated()
    keep_frozen_in(torch.bfloat16, model.layers)
    frozen = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.ndim == 2)
    assert before - torch.cuda.memory_allocated() >= 1.5 * frozen
    assert SIZES["model__hidden_size"] == model.config.hidden_size
