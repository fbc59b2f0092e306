"""AdamW with moments in eight bits, by bitsandbytes."""

from __future__ import annotations

import sys

import pytest
import torch
from tiny import pertoken, rows_of

from pertoken import train
from pertoken.errors import RecipeError
from pertoken.recipe.train import TrainConfig

EIGHT = {"train__optimizer": "adamw8bit"}


def installed():
    return pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def test_without_the_library_it_is_refused_before_the_data_is_read(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(RecipeError, match=r"needs bitsandbytes, which is not installed; install it: pip install"):
        train(world.recipe(tmp_path / "run", **EIGHT, data__path=str(tmp_path / "not there.jsonl")))


@pytest.mark.parametrize(
    ("key", "value"), [("parallel", "fsdp"), ("dtype", "float64"), ("optimizer_dtype", "bfloat16")]
)
def test_what_it_cannot_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{value}"):
        TrainConfig.model_validate({"optimizer": "adamw8bit", key: value})


def test_its_updates_are_bitsandbytes_own_and_near_to_adamws():
    from pertoken.training.optimizers.adamw8bit import _BLOCK, AdamW8bit
    from pertoken.training.optimizers.optimizer import decay_groups

    library = installed()
    shapes = [(70, 100), (_BLOCK // 512 + 3, 512), (50,)]
    ours, theirs, plain = (
        [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(shapes)]
        for _ in range(3)
    )
    mine = AdamW8bit(decay_groups(ours, 0.1), betas=(0.9, 0.95))
    its = library.optim.AdamW8bit(decay_groups(theirs, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    exact = torch.optim.AdamW(decay_groups(plain, 0.1), lr=1e-2, betas=(0.9, 0.95))
    start = [p.detach().clone() for p in ours]
    for step in range(4):
        for i, group in enumerate(zip(ours, theirs, plain, strict=True)):
            gradient = torch.randn(shapes[i], generator=torch.Generator().manual_seed(100 * step + i))
            for parameter in group:
                parameter.grad = gradient.clone()
        for group in mine.param_groups:
            group["lr"] = 1e-2
        for optimizer in (mine, its, exact):
            optimizer.step()
    for i, (a, b, c) in enumerate(zip(ours, theirs, plain, strict=True)):
        if a.numel() >= 4096:
            assert torch.equal(a, b), shapes[i]
        else:
            assert (a - c).abs().max() < 1e-6
        assert (a - c).norm() < 0.05 * (c - start[i]).norm(), shapes[i]


def test_a_run_learns_and_its_resume_is_bitwise(world, tmp_path):
    installed()
    settings = {"train__max_steps": 8, "checkpoint__save_interval": 4, "model__vocab_size": 200, **EIGHT}
    train(world.recipe(tmp_path / "whole", **settings))
    train(world.recipe(tmp_path / "cut", **{**settings, "train__max_steps": 4}, train__schedule="constant"))
    whole = rows_of(tmp_path / "whole")
    assert whole[-1]["loss"] < whole[0]["loss"]
    code, _, err = pertoken(
        "train", world.write_recipe(tmp_path / "cut", **settings, train__schedule="constant"), "--resume"
    )
    assert code == 0, err
    train(world.recipe(tmp_path / "again", **settings, train__schedule="constant"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (tmp_path / run / "checkpoints" / "step-00000008" / name for run in ("again", "cut"))
        assert a.read_bytes() == b.read_bytes()
