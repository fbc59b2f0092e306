import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hf_versions import VERSION_5, with_rope
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from pertoken.data.batch.pack import MicroBatch
from pertoken.engines.cpu.engine import CpuEngine
from pertoken.errors import ModelError
from pertoken.folders.fused import fuse
from pertoken.folders.minimind import load_minimind, save_minimind
from pertoken.folders.weights import load_folder, resize_embeddings, save_folder
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import PLAIN, Execution
from pertoken.recipe.model import ModelConfig

pytestmark = pytest.mark.numeric

SHARED = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
}
SCALED = [family for family in FAMILIES if family != "phi3"]
# Texts are longer than the original length, and the frequencies are of all three kinds: kept, divided, in between.
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e2,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e2, "factor": 4.0}}
# Of four pairs of dimensions the first is kept, the last two are divided, and the second goes between.
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 5e2,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 6.0,
    }
}
MULTIPLIED = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.2,
    "logits_scaling": 5.0,
}
SLIDING, FULL = "sliding_attention", "full_attention"
PARTIAL = {
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e2, "partial_rotary_factor": 0.75},
}
WINDOWS = [  # shorter than the longest texts, in all layers and in some
    ("mistral", {"sliding_window": 7}),
    ("phi3", {"sliding_window": 7}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 20, "layer_types": [SLIDING, FULL]}),
    ("gemma3", {"sliding_window": 7, "layer_types": [SLIDING, FULL]}),
    ("olmo3", {"sliding_window": 7, "layer_types": [SLIDING, FULL]}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    (
        "smollm3",
        {
            "no_rope_layers": [0, 1],
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": [FULL, SLIDING],
        },
    ),
]
CAPPED = {"final_logit_softcapping": 7.0, "query_pre_attn_scalar": 5}
CAPPED_SCORES = CAPPED | {"attn_logit_softcapping": 2.0, "sliding_window": 7, "layer_types": [SLIDING, FULL]}
NOT_CAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
DENSE = [
    *((family, {}) for family in FAMILIES),
    ("llama", LLAMA3),
    ("qwen2", YARN),
    ("gemma3", LINEAR | {"layer_types": [SLIDING, FULL], "sliding_window": 7}),
    ("olmo3", YARN | {"layer_types": [FULL, SLIDING], "sliding_window": 7}),
    ("granite", MULTIPLIED),
    ("gemma3", CAPPED),
    ("phi3", PARTIAL),
    ("gemma2", CAPPED_SCORES),
    *WINDOWS,
]
MIXTURES = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
}
VARIANTS = (
    [
        pytest.param(family, keys, id=f"{family}-{'-'.join(map(str, keys)) or 'plain'}")
        for family in FAMILIES
        for keys in (
            {},
            {"head_dim": 20},  # not hidden_size / num_attention_heads
            {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1234.5}},
            {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "num_key_value_heads": 6},
        )
    ]
    + [
        pytest.param("llama", LLAMA3, id="llama3"),
        *(pytest.param(family, LINEAR, id=f"{family}-linear") for family in SCALED),
        *(pytest.param(family, YARN, id=f"{family}-yarn") for family in SCALED),
        pytest.param("phi3", PARTIAL, id="phi3-partial"),
        *(pytest.param(family, keys, id=f"{family}-layers-{i}") for i, (family, keys) in enumerate(WINDOWS)),
        pytest.param("granite", MULTIPLIED, id="granite-multiplied"),
        pytest.param("gemma3", CAPPED, id="gemma3-capped"),
        pytest.param("gemma2", CAPPED_SCORES, id="gemma2-capped"),
        pytest.param("gemma2", NOT_CAPPED, id="gemma2-not-capped"),
        pytest.param("llama", LLAMA3 | {"head_dim": 20, "tie_word_embeddings": False}, id="llama3-head_dim"),
    ]
    + [
        pytest.param(family, keys, id=f"{family}-{'-'.join(map(str, keys.values()))}")
        for family, keys in (
            ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": True}),
            ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False}),
            (
                "qwen3_moe",
                {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 24},
            ),
            ("qwen3_moe", {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False, "head_dim": 20}),
            (
                "qwen2_moe",
                {"num_experts": 5, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24, "head_dim": 8},
            ),
            ("olmoe", {"num_experts": 5, "num_experts_per_tok": 2}),
            ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
            ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "tie_word_embeddings": False}),
        )
    ]
)


def by_layer_type(family, rope):
    """`rope` in layers that see everything; OLMo 3 has one base in both kinds of layer."""
    base = 77.0 if family == "gemma3" else rope["rope_theta"]
    return {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": base}}


def random_hf_model(family, **keys):
    """Every weight random, norms too, and large enough that each one shows in the logits."""
    if family == "olmo2" and keys.get("rope_parameters") and not VERSION_5:
        pytest.skip("transformers 4 has no such scaling for OLMo 2: its configuration takes fields of version 3 alone")
    config_class, model_class = (FAMILIES | MIXTURES)[family]
    shared = SHARED | {"pad_token_id": None}  # whose embedding it would freeze
    if family in ("gemma2", "gemma3", "olmo3"):
        shared["layer_types"] = [FULL] * SHARED["num_hidden_layers"]
    if family in ("gemma3", "olmo3"):
        keys = {key: by_layer_type(family, value) if key == "rope_parameters" else value for key, value in keys.items()}
    keys = with_rope(keys)
    if family == "olmo3" and not VERSION_5:
        keys = {**keys, "rope_theta": 5e5}  # files of version 4 with any other base mean something else to version 5
    if family == "gemma2":
        shared["attn_implementation"] = "eager"  # sdpa leaves out the soft cap of attention in version 4
    model = model_class(config_class(**shared | keys)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and not name.endswith("bias")
            around = 1.0 if is_norm and not family.startswith("gemma") else 0.0
            parameter.copy_(around + (0.3 if parameter.ndim == 1 else 0.15) * noise)
    return model


def documents(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (n,), generator=generator) for n in lengths]


def flat(docs):
    row = torch.cat(docs)
    lengths = tuple(len(d) for d in docs)
    return MicroBatch(
        input_ids=row,
        labels=row,
        loss_mask=torch.ones(len(row), dtype=torch.bool),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        lengths=lengths,
    )


@torch.no_grad()
def relative_difference(model, hf_model, docs):
    """max |difference| / max |logit|; ours in one flat row, transformers one document at a time."""
    ours = model.logits(model.hidden_states(flat(docs)))
    theirs = torch.cat([hf_model(d[None]).logits[0] for d in docs]).to(ours.dtype)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def error(logits, exact):
    """max |difference| / max |logit|"""
    return float((logits.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(("family", "keys"), VARIANTS)
def test_logits_of_a_saved_transformers_model_equal_its_own(family, keys, tmp_path):
    hf_model = random_hf_model(family, **keys)
    hf_model.save_pretrained(tmp_path)
    model = load_folder(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert relative_difference(model, hf_model, documents([1, 7, 128, 129])) <= 1e-5


@pytest.mark.parametrize(("family", "keys"), VARIANTS)
def test_a_saved_folder_opens_in_transformers_with_the_same_logits(family, keys, tmp_path):
    hf_model = random_hf_model(family, **keys)
    hf_model.save_pretrained(tmp_path / "theirs")
    model = load_folder(tmp_path / "theirs")
    save_folder(model, tmp_path / "ours", eos_token_id=5)
    by = hf_model.config._attn_implementation
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation=by)
    assert type(reopened) is type(hf_model)
    assert reopened.generation_config.eos_token_id == 5
    for name, weight in hf_model.state_dict().items():
        assert torch.equal(reopened.state_dict()[name], weight), name
    theirs, ours = (load_file(tmp_path / name / "model.safetensors").keys() for name in ("theirs", "ours"))
    assert ours == theirs, "every tensor under the name that transformers gives it on disk"
    (doc,) = documents([40])
    again = load_folder(tmp_path / "ours")
    assert again.config == model.config
    with torch.no_grad():
        # Not bitwise: transformers leaves the weights where they lie in the mapped file, and products depend on that.
        found, plain = (hf(doc[None]).logits[0] for hf in (reopened, hf_model))
        exact = again.double().logits(again.hidden_states(flat([doc])))
    assert error(found, exact) <= 3 * error(plain, exact)


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
@pytest.mark.parametrize(("family", "keys"), DENSE)
def test_gradients_equal_those_of_transformers(family, keys, kernels, tmp_path):
    hf_model = random_hf_model(family, **keys).double()
    hf_model.save_pretrained(tmp_path)
    model, docs = load_folder(tmp_path, dtype=torch.float32 if kernels else torch.float64), documents([3, 30, 131])
    execution = Execution(CpuEngine(torch.float32)) if kernels else PLAIN
    assert execution.engine.supports(model) is None
    model(flat(docs), execution).loss_sum.backward()
    for doc in docs:  # labels are the inputs themselves in `flat`: unshifted, as good as any
        logits = hf_model(doc[None]).logits[0]
        torch.nn.functional.cross_entropy(logits, doc, reduction="sum").backward()
    ours = fuse({name: parameter.grad for name, parameter in model.named_parameters()}, model.config)
    for name, parameter in hf_model.named_parameters():
        # transformers takes its rotary angles and its norms in float32 even here
        assert float((ours[name] - parameter.grad).norm() / parameter.grad.norm()) < 1e-5, name


class Float64:
    """`torch` for transformers' modules, which would take rotary angles, norms and routers in float32 even here."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize(("family", "keys"), DENSE)
def test_float64_gradients_are_those_of_a_plain_loop_over_transformers_in_float64(family, keys, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for module in (sys.modules[FAMILIES[family][1].__module__], transformers.modeling_rope_utils):
        monkeypatch.setattr(module, "torch", Float64())
    try:
        hf_model = random_hf_model(family, **keys)
    finally:
        torch.set_default_dtype(torch.float32)
    hf_model.save_pretrained(tmp_path)
    model, docs = load_folder(tmp_path, dtype=torch.float64), documents([3, 30, 131])
    for execution in (PLAIN, Execution(loss_impl="reference"), Execution(activation_checkpointing=True)):
        model.zero_grad()
        hf_model.zero_grad()
        loss_sum = model(flat(docs), execution).loss_sum
        loss_sum.backward()
        total = 0.0
        for doc in docs:
            loss = torch.nn.functional.cross_entropy(hf_model(doc[None]).logits[0], doc, reduction="sum")
            loss.backward()
            total += float(loss.detach())
        assert float(loss_sum.detach()) == pytest.approx(total, rel=1e-12)
        ours = fuse({name: parameter.grad for name, parameter in model.named_parameters()}, model.config)
        for name, gradient in ours.items():
            theirs = hf_model.get_parameter(name).grad
            assert float((gradient - theirs).abs().max() / theirs.abs().max()) < 1e-10, name


def gradients_of_expert(experts, i):
    """(Gate and up, down); in version 4 of transformers each expert is a module."""
    if VERSION_5:
        return experts.gate_up_proj.grad[i], experts.down_proj.grad[i]
    parts = dict(experts[i].named_children())
    gate, up, down = (parts[mixtral if mixtral in parts else other].weight.grad for mixtral, other in _PARTS)
    return torch.cat([gate, up]), down


_PARTS = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))


@pytest.mark.parametrize("family", MIXTURES)
def test_gradients_of_experts_equal_those_of_transformers(family, tmp_path):
    hf_model = random_hf_model(family, num_experts=4, num_experts_per_tok=2).double()
    hf_model.save_pretrained(tmp_path)
    if VERSION_5:
        hf_model.set_experts_implementation("eager")  # the grouped one has no float64
    model, docs = load_folder(tmp_path, dtype=torch.float64), documents([3, 30, 31])
    model(flat(docs)).loss_sum.backward()
    for doc in docs:
        logits = hf_model(doc[None]).logits[0]
        torch.nn.functional.cross_entropy(logits, doc, reduction="sum").backward()
    for layer, hf_layer in zip(model.model.layers, hf_model.model.layers, strict=True):
        ours, theirs = layer.mlp, hf_layer.block_sparse_moe if hasattr(hf_layer, "block_sparse_moe") else hf_layer.mlp
        pairs = [(ours.gate.weight.grad, theirs.gate.weight.grad)]
        for i, expert in enumerate(ours.experts):
            gate_up = torch.cat([expert.gate_proj.weight.grad, expert.up_proj.weight.grad])
            pairs += zip((gate_up, expert.down_proj.weight.grad), gradients_of_expert(theirs.experts, i), strict=True)
        if family == "qwen2_moe":
            pairs += [(ours.shared_expert_gate.weight.grad, theirs.shared_expert_gate.weight.grad)]
            for name, parameter in theirs.shared_expert.named_parameters():
                pairs += [(ours.shared_expert.get_parameter(name).grad, parameter.grad)]
        for a, b in pairs:
            # transformers takes its rotary angles, its norms and its router in float32 even here
            assert float((a - b).norm() / b.norm()) < 1e-5


def test_sharded_weights_load(tmp_path):
    hf_model = random_hf_model("qwen3")
    hf_model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert relative_difference(load_folder(tmp_path), hf_model, documents([20])) <= 1e-5


def test_a_model_can_be_saved_over_the_folder_it_came_from(tmp_path):
    model = random_model()
    save_folder(model, tmp_path, eos_token_id=1)
    loaded = load_folder(tmp_path)
    loaded.model.norm.weight.data.mul_(2)  # and leave the rest as it was read
    save_folder(loaded, tmp_path, eos_token_id=1)
    model.model.norm.weight.data.mul_(2)
    for name, weight in load_folder(tmp_path).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.parametrize("padding", range(0, 64, 8))
def test_loaded_weights_lie_where_torch_itself_would_put_them(padding, tmp_path):
    """The last bit of a product depends on where its factors lie, and in the mapped file they lie at any multiple of
    eight. A resumed run would part from the uninterrupted one."""
    save_folder(random_model(head_dim=10), tmp_path, eos_token_id=1)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "padding": " " * padding})
    model = load_folder(tmp_path)
    assert {name for name, p in model.named_parameters() if p.data_ptr() % 64} == set()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, tensors[name]), name


def random_model(**keys):
    config = ModelConfig.model_validate(SHARED | {"family": "qwen3"} | keys).resolve(97)
    return CausalLM(config, seed=1)


# Folders that cannot be used


def corrupt(folder, case):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    match case:
        case "no config":
            (folder / "config.json").unlink()
            return "config.json: cannot be read"
        case "bad json":
            (folder / "config.json").write_text("{")
            return "config.json: not JSON"
        case "json list":
            (folder / "config.json").write_text("[]")
            return "config.json: not a JSON object"
        case "no weights":
            file.unlink()
            return "no model.safetensors"
        case "pickled":
            file.rename(folder / "pytorch_model.bin")
            return "save_pretrained"
        case "cut short":
            file.write_bytes(file.read_bytes()[:-100])
            return "model.safetensors: cannot be read"
        case "missing":
            del tensors[name]
            found = f"{name}: missing"
        case "extra":
            tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
            found = "q_proj.bias: no place"
        case "shape":
            tensors[name] = tensors[name][:-1].clone()
            found = f"{name}: shape [79, 48] is not [80, 48]"
        case "dtype":
            tensors[name] = tensors[name].to(torch.int8)
            found = f"{name}: dtype torch.int8"
        case "other head":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
            found = "tie_word_embeddings"
    save_file(tensors, file)
    return found


@pytest.mark.parametrize(
    "case",
    [
        *("no config", "bad json", "json list", "no weights", "pickled", "cut short"),
        *("missing", "extra", "shape", "dtype", "other head"),
    ],
)
def test_a_broken_folder_is_refused_by_name(case, tmp_path):
    save_folder(random_model(), tmp_path, eos_token_id=1)
    found = corrupt(tmp_path, case)
    with pytest.raises(ModelError) as caught:
        load_folder(tmp_path)
    assert found in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_saved_beside_its_equal_embedding_and_derived_buffers_are_accepted(tmp_path):
    model = random_model()
    save_folder(model, tmp_path, eos_token_id=1)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_folder(tmp_path).state_dict().keys() == model.state_dict().keys()


def test_a_missing_head_of_an_untied_model_is_named(tmp_path):
    save_folder(random_model(), tmp_path, eos_token_id=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"lm_head\.weight: missing"):
        load_folder(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_folders_say_so_and_load_as_float32(dtype, tmp_path):
    model = random_model()
    save_folder(model, tmp_path, eos_token_id=1, dtype=dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == dtype
    for name, weight in load_folder(tmp_path).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].to(dtype).float()), name


def test_the_tokenizer_and_its_special_tokens_are_saved(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "<end>": 2, "<pad>": 3}, unk_token="<unk>")),
        bos_token="<s>",
        pad_token="<pad>",
    )
    save_folder(random_model(), tmp_path, eos_token_id=2, tokenizer=tokenizer)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == 4
    config = json.loads((tmp_path / "config.json").read_text())
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 3]
    assert [config[f"{name}_token_id"] for name in ("bos", "eos")] == [1, 2]
    assert "pad_token_id" not in config, "transformers would freeze that token's embedding"


# MiniMind


def minimind_tensors(hf_model):
    """What MiniMind saves: the state dict, tied head included, in float16."""
    return {name: weight.half() for name, weight in hf_model.state_dict().items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_minimind_file_computes_what_qwen3_does(tied, tmp_path):
    hf_model = random_hf_model(
        "qwen3",
        tie_word_embeddings=tied,
        head_dim=12,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    tensors = minimind_tensors(hf_model)
    torch.save(tensors, tmp_path / "full_sft_48.pth")
    hf_model.load_state_dict({name: weight.float() for name, weight in tensors.items()})
    model = load_minimind(tmp_path / "full_sft_48.pth")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.tie_word_embeddings == tied
    assert model.config.head_dim == 12
    assert relative_difference(model, hf_model, documents([1, 7, 128, 129])) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_minimind_file_has_every_tensor_and_comes_back(dtype, tied, tmp_path):
    model = random_model(rope_theta=1e6, tie_word_embeddings=tied, max_position_embeddings=32768)
    save_minimind(model, tmp_path / "model.pth", dtype=dtype)
    tensors = torch.load(tmp_path / "model.pth", weights_only=True)
    assert tensors.keys() == random_hf_model("qwen3").state_dict().keys()
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    loaded = load_minimind(tmp_path / "model.pth")
    assert loaded.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(dtype).float()), name


MIXTURE = {"use_moe": True, "num_experts": 3, "moe_intermediate_size": 24, "intermediate_size": 24}
MINIMIND = {"rope_theta": 1e6, "max_position_embeddings": 32768}


def test_a_minimind_mixture_goes_out_and_comes_back_with_one_expert_a_token(tmp_path):
    model = random_model(**MIXTURE, **MINIMIND)
    save_minimind(model, tmp_path / "model.pth", dtype=torch.float32)
    tensors = torch.load(tmp_path / "model.pth", weights_only=True)
    # MiniMind's names, as its MOEFeedForward gives them
    parts = ["gate.weight", *(f"experts.{i}.{x}_proj.weight" for i in range(3) for x in ("gate", "up", "down"))]
    assert {name for name in tensors if ".mlp." in name} == {
        f"model.layers.{i}.mlp.{x}" for i in range(2) for x in parts
    }
    loaded = load_minimind(tmp_path / "model.pth")
    assert loaded.config == model.config
    assert (loaded.config.num_experts_per_tok, loaded.config.norm_topk_prob) == (1, True)
    docs = documents([1, 7, 40])
    with torch.no_grad():
        assert torch.equal(loaded.hidden_states(flat(docs)), model.hidden_states(flat(docs)))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({**MIXTURE, **MINIMIND, "num_experts_per_tok": 2}, "num_experts_per_tok=2"),
        ({**MIXTURE, **MINIMIND, "norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"family": "llama", "rope_theta": 1e6}, "family"),
        ({**MIXTURE, **MINIMIND, "family": "olmoe"}, "family"),  # whose norm of queries is over all heads
        ({"family": "gemma3", "rope_theta": 1e6}, "family"),
        ({"rope_theta": 1e4}, "rope_theta"),
        ({"rope_theta": 1e6, "rms_norm_eps": 1e-5}, "rms_norm_eps"),
    ],
)
def test_what_a_minimind_file_cannot_carry_is_refused(keys, named, tmp_path):
    with pytest.raises(ModelError, match=named):
        save_minimind(random_model(**keys), tmp_path / "model.pth")
    assert not any(tmp_path.iterdir())


def broken_minimind(tensors, case):
    match case:
        case "moe":
            return tensors | {
                "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 2)
            }, r"experts\.0\.up_proj\.weight: no place"
        case "no experts":
            first = "model.layers.0.mlp."
            tensors = {n: t for n, t in tensors.items() if not n.startswith(first)}
            gate = torch.zeros(0, 48)
            return tensors | {f"{first}gate.weight": gate, f"{first}experts.0.gate_proj.weight": gate}, "shapes that no"
        case "old":
            return {n: t for n, t in tensors.items() if "q_norm" not in n}, "q_norm.weight: missing"
        case "layer":
            return {
                n: t for n, t in tensors.items() if n != "model.layers.1.mlp.up_proj.weight"
            }, "layers.1.mlp.up_proj"
        case "resume":
            return {"model": tensors, "step": 3}, "not a state dict"
        case _:
            return tensors | {"model.vision.weight": torch.zeros(2)}, "model.vision.weight"


@pytest.mark.parametrize("case", ["moe", "no experts", "old", "layer", "resume", "extra"])
def test_a_foreign_minimind_file_is_refused_by_name(case, tmp_path):
    tensors, named = broken_minimind(minimind_tensors(random_hf_model("qwen3")), case)
    torch.save(tensors, tmp_path / "model.pth")
    with pytest.raises(ModelError, match=named):
        load_minimind(tmp_path / "model.pth")


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", b"PK\x03\x04cut"], ids=str)
def test_a_file_that_is_no_pth_is_refused(content, tmp_path):
    path = tmp_path / "model.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.pth: ") as caught:
        load_minimind(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model.norm.weight": Code()}, tmp_path / "model.pth")
    with pytest.raises(ModelError):
        load_minimind(tmp_path / "model.pth")
    assert not (tmp_path / "ran").exists()


# New tokens


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_old_logits_stay(tied, tmp_path):
    model = random_model(tie_word_embeddings=tied)
    docs = documents([9])
    tables = [w.detach().clone() for w in (model.model.embed_tokens.weight, model.head_weight)]
    with torch.no_grad():
        before = model.logits(model.hidden_states(flat(docs)))
        resize_embeddings(model, 100)
        after = model.logits(model.hidden_states(flat(docs)))
        exact = model.double().logits(model.hidden_states(flat(docs)))[:, :97]
    model.float()
    # Not bitwise: a product with more columns may be computed by another kernel.
    assert error(after[:, :97], exact) <= 3 * error(before, exact)
    assert model.config.vocab_size == 100
    for weight, old in zip((model.model.embed_tokens.weight, model.head_weight), tables, strict=True):
        assert torch.equal(weight[:97], old)
        torch.testing.assert_close(weight[97:].detach(), old.mean(0).expand(3, -1))
        assert weight.requires_grad
    save_folder(model, tmp_path, eos_token_id=1)
    assert load_folder(tmp_path).config == model.config


def test_tokens_are_never_removed():
    model = random_model()
    resize_embeddings(model, 97)
    with pytest.raises(ModelError, match="vocab_size=96"):
        resize_embeddings(model, 96)
