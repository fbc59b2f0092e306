"""Models in GGUF: what llama.cpp's converter wrote is read back as the model that it was."""

from __future__ import annotations

import struct
import sys
from typing import Any

import numpy as np
import pytest
import torch
from gguf_cases import NEIGHBOURS_TURN, package, write_gguf

from pertoken import load_model
from pertoken.errors import ModelError
from pertoken.families import FAMILIES
from pertoken.folders.gguf import config_of_gguf, count_gguf, load_gguf
from pertoken.gguf_file import read_gguf
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig

# 2^-20 and these bases are the same in float32, as which GGUF has them.
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 2.0**-20,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama 3.1": ("llama", {"rope_scaling": ROPE, "rope_theta": 500000.0, "head_dim": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3moe": (
        "qwen3moe",
        {"use_moe": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": (1, 1, 1, 0)}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.75,
            "attention_multiplier": 0.125,
            "logits_scaling": 0.5,
        },
    ),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "gemma3",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 20,
            "layer_types": ("sliding_attention",) * 5 + ("full_attention", "sliding_attention"),
        },
    ),
}


def random_model(name: str, **changes: Any) -> tuple[str, CausalLM]:
    """Every parameter random, norms and biases too, and such that adding one to it and taking it off is exact."""
    arch, keys = MODELS[name]
    family = arch.removesuffix("moe")
    values = SHAPE | keys | changes
    model = CausalLM(ModelConfig(family=family, **values).resolve(97), seed=1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = torch.randint(-64, 64, parameter.shape) / 128
    return arch, model.requires_grad_(False)


def logits(model: CausalLM) -> torch.Tensor:
    ids = torch.arange(60) * 7 % 97
    return model.decode(ids, model.new_cache(60))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_read_as_it_was_written(name, tmp_path):
    arch, model = random_model(name)
    path = write_gguf(tmp_path / "model.gguf", model, arch)
    read = load_gguf(path)
    assert read.config.model_dump(exclude={"aux_loss_coef"}) == model.config.model_dump(exclude={"aux_loss_coef"})
    assert config_of_gguf(path) == read.config
    for key, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[key], weight), key
    assert torch.equal(logits(read), logits(model))
    assert all(p.requires_grad and p.data_ptr() % 64 == 0 for p in read.parameters())
    assert count_gguf(path) - 32 * (name == "llama 3.1") == model.config.num_parameters
    assert torch.equal(logits(load_model(path)), logits(model))


def test_every_record_is_tried_here():
    assert {arch for arch, _ in MODELS.values()} == {f.gguf.architecture for f in FAMILIES.values() if f.gguf}
    assert {f.gguf.architecture for f in FAMILIES.values() if f.gguf and f.gguf.neighbours_turn} == {*NEIGHBOURS_TURN}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_quantized_weights_are_those_that_the_package_dequantizes(name, kind, dtype, tmp_path):
    gguf = package()
    arch, model = random_model(name)
    read = load_gguf(write_gguf(tmp_path / "model.gguf", model, arch, quantized=kind), dtype=dtype)
    for key, weight in model.state_dict().items():
        if weight.dim() > 1:
            quantization = gguf.GGMLQuantizationType[kind]
            weight = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), quantization), quantization))
        assert torch.equal(read.state_dict()[key], weight.to(dtype)), key


def test_the_header_is_what_the_package_reads(tmp_path):
    gguf = package()
    arch, model = random_model("llama")
    more = {"a.list": [1, -2], "a.flag": True, "a.text": "ü\n", "a.texts": ["x", "", "日"], "a.numbers": [0.5, 1.5]}
    path = write_gguf(tmp_path / "model.gguf", model, arch, more=more, quantized="Q8_0")
    theirs, ours = gguf.GGUFReader(path), read_gguf(path)
    assert ours.metadata == {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert {name: (t.shape, t.kind, t.offset) for name, t in ours.tensors.items()} == {
        t.name: (tuple(reversed(t.shape.tolist())), int(t.tensor_type), t.data_offset) for t in theirs.tensors
    }


def without(name: str):
    return lambda found: {key: weight for key, weight in found.items() if key != name}


def with_more(name: str, *shape: int):
    return lambda found: found | {name: torch.ones(shape)}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"arch": "rwkv6"}, r"general.architecture='rwkv6': pertoken reads qwen3, .* from GGUF; choose"),
    "a feature": (
        {"more": {"llama.attention.clamp_kqv": 8.0}},
        r"llama.attention.clamp_kqv=8.0: pertoken has no such feature; choose",
    ),
    "a window": (
        {"more": {"llama.attention.sliding_window": 40}},
        "llama.attention.sliding_window=40: pertoken has no",
    ),
    "experts": ({"more": {"llama.expert_count": 8}}, "llama.expert_count=8: llama models read from GGUF have no expe"),
    "scaled angles": ({"more": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type='yarn': read from GGUF"),
    "half a head turned": ({"more": {"llama.rope.dimension_count": 8}}, "llama.rope.dimension_count=8: rotary embeddi"),
    "heads by layer": (
        {"more": {"llama.attention.head_count_kv": [2, 1]}},
        r"llama.attention.head_count_kv=\[2, 1\]: must be a whole number; convert",
    ),
    "no layers said": ({"more": {"llama.block_count": None}}, "llama.block_count: missing; convert"),
    "heads that do not fit": (
        {"more": {"llama.attention.head_count_kv": 3}},
        r"as a config.json .*num_key_value_heads=3",
    ),
    "more layers": ({"more": {"llama.block_count": 3}}, r"blk.2.attn_k.weight, .*: missing; the file is incomplete"),
    "too many layers": (
        {"more": {"llama.block_count": 3000000}},
        "num_hidden_layers=3000000: the weights have 21 tens",
    ),
    "fewer layers": ({"more": {"llama.block_count": 1}}, r"blk.1.attn_k.weight, .*: no place in llama; choose another"),
    "a tensor missing": ({"tensors": without("blk.1.ffn_up.weight")}, "blk.1.ffn_up.weight: missing; the file is inco"),
    "no embedding": ({"tensors": without("token_embd.weight")}, "token_embd.weight: missing; name a file with a whole"),
    "a bias": ({"tensors": with_more("blk.0.attn_q.bias", 64)}, "blk.0.attn_q.bias: no place in llama; choose another"),
    "a shape": (
        {"tensors": with_more("blk.0.attn_q.weight", 32, 64)},
        r"blk.0.attn_q.weight: shape \[32, 64\] does not fit \[64, 64\] of the metadata",
    ),
    "other frequencies": ({"tensors": with_more("rope_freqs.weight", 8)}, None),
    "frequencies of others": (
        {"tensors": lambda found: found | {"rope_freqs.weight": torch.arange(1.0, 9)}},
        "rope_freqs.weight: not the scaling of Llama 3.1 to 3.3",
    ),
    "a part": ({"more": {"split.count": 2}}, r"one of several files; join them with llama-gguf-split"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_pertoken_lacks_is_refused_by_name(case, tmp_path):
    changes, words = WRONG[case]
    _, model = random_model("llama")
    path = write_gguf(tmp_path / "model.gguf", model, **{"arch": "llama", **changes})
    if words is None:  # factors of 1 are no scaling
        assert load_gguf(path).config.rope_scaling.factor == 1
        return
    with pytest.raises(ModelError, match=words) as caught:
        load_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_an_unknown_quantization_is_refused_by_name(tmp_path):
    arch, model = random_model("llama")
    path = write_gguf(tmp_path / "model.gguf", model, arch, quantized="Q8_0")
    content, name = path.read_bytes(), b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    for kind, words in ((999, "quantization 999 is unknown"), (9, "cannot dequantize Q8_1"), (12, "in Q4_K; convert")):
        path.write_bytes(content[:at] + struct.pack("<I", kind) + content[at + 4 :])
        with pytest.raises(ModelError, match=f"token_embd.weight: .*{words}"):
            load_gguf(path)


def test_a_file_that_ends_early_or_is_none_is_refused_in_one_line(tmp_path):
    arch, model = random_model("llama")
    content = write_gguf(tmp_path / "whole.gguf", model, arch).read_bytes()
    path = tmp_path / "model.gguf"
    for end in (*range(0, 300, 7), *np.linspace(300, len(content) - 32, 30, dtype=int)):
        path.write_bytes(content[:end])
        with pytest.raises(ModelError, match=r"ends before|not a GGUF file") as caught:
            load_gguf(path)
        assert "\n" not in str(caught.value)
    for start, words in (
        (b"PK\x03\x04", "not a GGUF file"),
        (b"GGUF\x01\0\0\0", "of version 1"),
        (b"GGUF\0\0\0\3", "big"),
    ):
        path.write_bytes(start + content[8:])
        with pytest.raises(ModelError, match=words):
            load_gguf(path)
    for missing in (tmp_path / "nowhere.gguf", tmp_path):
        with pytest.raises(ModelError, match="cannot be read"):
            load_gguf(missing)


def test_damaged_bytes_of_the_header_are_refused_in_one_line(tmp_path):
    """Lengths beyond the file, types that are none, text that is none: an error of ours, or a model all the same."""
    arch, model = random_model("llama")
    content = write_gguf(tmp_path / "whole.gguf", model, arch).read_bytes()
    path, rng = tmp_path / "model.gguf", np.random.default_rng(0)
    messages = []
    for at in rng.integers(8, 1600, 150):
        path.write_bytes(content[:at] + bytes(rng.integers(0, 256, 2, dtype=np.uint8)) + content[at + 2 :])
        try:
            load_gguf(path)
        except ModelError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert not [message for message in messages if "\n" in message]


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    arch, model = random_model("llama")
    path = write_gguf(tmp_path / "model.gguf", model, arch)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert config_of_gguf(path) == model.config
    with pytest.raises(ModelError, match=r'is not installed; pip install "pertoken\[gguf\]"'):
        load_gguf(path)


def test_a_path_that_is_no_file_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="not a run, not a model folder"):
        load_model(tmp_path / "nowhere.gguf")
