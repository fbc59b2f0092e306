"""AdamW with moments in bfloat16: rounded without bias, alike on every rank and after a resume, half as large."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import rows_of

from pertoken import train
from pertoken.errors import RecipeError
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig
from pertoken.recipe.train import TrainConfig
from pertoken.training.optimizers import adamw_bfloat16, build_optimizer
from pertoken.training.optimizers.adamw import AdamW
from pertoken.training.optimizers.adamw_bfloat16 import AdamWBfloat16, random_bits, round_up_or_down

CONFIG = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16).resolve(11)
LOW = {"train__optimizer_dtype": "bfloat16"}


def small(optimizer_dtype="bfloat16", seed=42):
    model = CausalLM(CONFIG, seed=0, dtype=torch.float32)
    settings = {"learning_rate": 1e-2, "optimizer_dtype": optimizer_dtype, "seed": seed}
    return model, build_optimizer(model, TrainConfig.model_validate(settings))


def take_step(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    optimizer.step()


def states(model, optimizer):
    return {f"{name}/{key}": v for name, p in model.named_parameters() for key, v in optimizer.state[p].items()}


def test_rounding_gives_a_neighbour_and_has_no_bias():
    """The mean of n roundings is within five standard errors of the number, in float64, for each of 200 numbers."""
    n, generator = 20_000, torch.Generator()
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 2, 200)
    for i, number in enumerate(x):
        rounded = round_up_or_down(number.expand(n).contiguous(), random_bits(n, (i,), generator)[0]).double()
        towards_zero = (number.view(torch.int32) & -0x10000).view(torch.float32).double()
        away = ((number.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).double()
        assert set(rounded.tolist()) <= {float(towards_zero), float(away)}
        share = (number.double() - towards_zero) / (away - towards_zero)
        error = (rounded.mean() - number.double()).abs()
        assert error <= 5 * (away - towards_zero).abs() * (share * (1 - share) / n).sqrt() + 1e-30, float(number)


def test_the_two_moments_are_rounded_by_bits_of_their_own():
    first, second = random_bits(100_000, (1, 2, 3, 4), torch.Generator()).double()
    for bits in (first, second):
        assert abs(float(bits.mean()) + 0.5) < 5 * 2**16 / (12 * 100_000) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 5 / 100_000**0.5


def test_what_is_representable_stays_as_it_is():
    x = torch.randn(1000).bfloat16()
    assert torch.equal(round_up_or_down(x.float(), random_bits(1000, (0,), torch.Generator())[1]), x)


def test_updates_are_those_of_adamw_up_to_the_rounding_of_moments():
    (model, optimizer), (plain, its_optimizer) = small(), small("float32")
    assert type(optimizer) is AdamWBfloat16
    assert type(its_optimizer) is AdamW
    take_step(model, optimizer, 0)
    take_step(plain, its_optimizer, 0)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), "the first update has nothing that was rounded"
    expected = states(plain, its_optimizer)
    for name, value in states(model, optimizer).items():
        assert value.dtype == (torch.float32 if name.endswith("/step") else torch.bfloat16)
        assert ((value - expected[name]).abs() <= 2**-7 * expected[name].abs()).all()
    assert any(not torch.equal(v.float(), expected[n]) for n, v in states(model, optimizer).items())


def test_what_is_drawn_depends_on_seed_update_and_place_alone():
    (model, optimizer), (again, its_optimizer), (other, others) = small(), small(), small(seed=43)
    for number in range(3):
        take_step(model, optimizer, number)
        torch.manual_seed(number)  # nothing of the global random state counts
        torch.rand(number + 1)
        take_step(again, its_optimizer, number)
        take_step(other, others, number)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_part_of_a_parameter_is_updated_as_in_the_whole(monkeypatch):
    """As FSDP2 shards it: rows 5 to 11 of a matrix, with blocks that begin and end elsewhere."""
    monkeypatch.setattr(adamw_bfloat16, "_BLOCK", 8)
    matrix = torch.nn.Parameter(torch.randn(16, 6, generator=torch.Generator().manual_seed(0)))
    part = torch.nn.Parameter(matrix.detach()[5:12].clone())
    made = {}
    for parameter, first in ((matrix, 0), (part, 5 * 6)):
        monkeypatch.setattr(adamw_bfloat16, "first_number", lambda p, first=first: first)
        optimizer = AdamWBfloat16([{"params": [parameter], "weight_decay": 0.1}], betas=(0.9, 0.99), seed=7)
        for number in range(3):
            whole = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
            parameter.grad = whole if parameter is matrix else whole[5:12].clone()
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
        made[first] = [
            parameter.detach(),
            optimizer.state[parameter]["exp_avg"],
            optimizer.state[parameter]["exp_avg_sq"],
        ]
    for whole, here in zip(made[0], made[30], strict=True):
        assert torch.equal(whole[5:12], here)


def test_a_copied_optimizer_continues_to_the_bit():
    model, optimizer = small()
    take_step(model, optimizer, 0)
    again, its_optimizer = small()
    again.load_state_dict(model.state_dict())
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        its_optimizer.state[b] = copy.deepcopy(optimizer.state[a])
    take_step(model, optimizer, 1)
    take_step(again, its_optimizer, 1)
    found, expected = states(again, its_optimizer), states(model, optimizer)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Twelve steps with moments in float32 and in bfloat16."""
    folder, settings = tmp_path_factory.mktemp("runs"), {"train__max_steps": 12, "checkpoint__save_interval": 5}
    train(world.recipe(folder / "float32", **settings))
    train(world.recipe(folder / "bfloat16", **settings, **LOW))
    return folder


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(world, runs, tmp_path):
    shutil.copytree(runs / "bfloat16", tmp_path / "cut", symlinks=True)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000012")
    settings = {"train__max_steps": 12, "checkpoint__save_interval": 5}
    train(world.recipe(tmp_path / "cut", **settings, **LOW), resume=True)
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, cut = (f / "checkpoints" / "step-00000012" / name for f in (runs / "bfloat16", tmp_path / "cut"))
        assert whole.read_bytes() == cut.read_bytes()


def test_the_state_is_half_as_large(runs):
    sizes = {}
    for name in ("float32", "bfloat16"):
        state = load_file(runs / name / "checkpoints" / "step-00000012" / "optimizer.safetensors")
        sizes[name] = sum(v.numel() * v.element_size() for k, v in state.items() if not k.endswith("/step"))
    assert sizes["float32"] == 2 * sizes["bfloat16"]


def test_losses_stay_close_to_those_of_float32(runs):
    wide, low = (rows_of(runs / name) for name in ("float32", "bfloat16"))
    assert wide[0]["loss"] == low[0]["loss"]
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(wide, low, strict=True)]
    assert max(apart) < 2e-3, apart
    assert wide[0]["loss"] - wide[-1]["loss"] > 50 * max(apart)
    assert any(apart)


def test_a_resume_with_the_other_dtype_is_refused(world, runs):
    for name, other in (("float32", "bfloat16"), ("bfloat16", "float32")):
        recipe = world.recipe(runs / name, train__max_steps=14, train__optimizer_dtype=other)
        with pytest.raises(RecipeError, match=f"train.optimizer_dtype='{other}': was '{name}' when step-00000012"):
            train(recipe, resume=True)


def test_float64_is_refused_in_words():
    with pytest.raises(ValueError, match=r'train\.optimizer_dtype="bfloat16": with train\.dtype="float64"'):
        TrainConfig.model_validate({"optimizer_dtype": "bfloat16", "dtype": "float64"})
