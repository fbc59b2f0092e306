"""Rotary frequencies are transformers', plain and scaled, and turning by them is the plain formula."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from hf_versions import rope_keys
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pertoken.model.rope import frequencies, rope_angles, rotary_scale, rotate
from pertoken.recipe.model import ModelConfig, ResolvedModelConfig

pytestmark = pytest.mark.numeric

SCALINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "Llama 3.1": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192},
    "Llama 3.2": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192},
    "short": {"factor": 2.5, "low_freq_factor": 0.5, "high_freq_factor": 6.0, "original": 100},
    "linear": {"rope_type": "linear", "factor": 8.0},
    "YaRN": {"rope_type": "yarn", "factor": 4.0, "original": 32768},
    "YaRN of DeepSeek": {"rope_type": "yarn", "factor": 40.0, "original": 4096, "mscale": 1.0, "mscale_all_dim": 0.5},
    "YaRN, all keys": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original": 64,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "attention_factor": 1.3,
        "truncate": False,
    },
    "YaRN of few dimensions": {"rope_type": "yarn", "factor": 2.0, "original": 2, "beta_fast": 1.0},
}


def config_of(name: str) -> ResolvedModelConfig:
    scaling = deepcopy(SCALINGS[name])
    if scaling is not None:
        scaling |= {"original_max_position_embeddings": scaling.pop("original")} if "original" in scaling else {}
    keys = {"hidden_size": 256, "num_attention_heads": 4, "rope_theta": 5e5, "max_position_embeddings": 131072}
    return ModelConfig.model_validate({"family": "llama", "rope_scaling": scaling, **keys}).resolve(10)


def theirs(config: ResolvedModelConfig) -> LlamaRotaryEmbedding:
    rope = (
        {"rope_type": "default"} if config.rope_scaling is None else config.rope_scaling.model_dump(exclude_none=True)
    )
    rope["rope_theta"] = config.rope_theta
    return LlamaRotaryEmbedding(
        LlamaConfig(head_dim=config.head_dim, max_position_embeddings=131072, **rope_keys(rope))
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name):
    config = config_of(name)
    ours, expected = frequencies(config, torch.float32), theirs(config).inv_freq
    assert float(((ours - expected) / expected).abs().max()) < 4e-7
    exact = frequencies(config, torch.float64)
    assert float(((ours - exact) / exact).abs().max()) < 4e-7
    assert (ours.diff() < 0).all()
    assert rotary_scale(config) == pytest.approx(theirs(config).attention_scaling, rel=1e-12)


def test_high_frequencies_stay_and_low_ones_are_divided():
    plain, scaled = (frequencies(config_of(name), torch.float64) for name in ("plain", "Llama 3.2"))
    turns = plain * 8192 / (2 * math.pi)
    assert torch.equal(scaled[turns >= 4], plain[turns >= 4])
    assert torch.equal(scaled[turns <= 1], plain[turns <= 1] / 32)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 32))[between].all()


@pytest.mark.parametrize("name", SCALINGS)
def test_angles_far_beyond_the_original_length_are_as_exact_as_transformers(name):
    """Both multiply in float32, where a position of 10^5 has angles that are off by some 10^-3."""
    config, positions = config_of(name), torch.tensor([0, 1, 63, 64, 8191, 8192, 30_000, 131_071])
    exact = positions.double()[:, None] * frequencies(config, torch.float64)
    cos, sin = rope_angles(positions, config, torch.float32)
    their_cos, their_sin = theirs(config)(torch.zeros(1, dtype=torch.float32), positions[None])
    half = config.head_dim // 2
    for ours, other, right in (
        (cos[:, 0], their_cos[0, :, :half], exact.cos()),
        (sin[:, 0], their_sin[0, :, :half], exact.sin()),
    ):
        error, their_error = ((x - right).abs().max() for x in (ours, other))
        assert float(error) <= 2 * float(their_error)


def test_turning_and_its_gradient_are_the_plain_formula():
    config = config_of("short")
    x = torch.randn(7, 3, config.head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rope = rope_angles(torch.arange(7), config, torch.float64)
    cos, sin = rope
    a, b = x.requires_grad_().chunk(2, -1)
    plain = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    out = rotate(x, rope)
    torch.testing.assert_close(out, plain, rtol=1e-14, atol=1e-14)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, expected = (torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (out, plain))
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
