from copy import deepcopy

import pytest
import torch
from hf_versions import VERSION_5, only_5, rope_of
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from pertoken.errors import ModelError
from pertoken.folders.config import config_from_hf, config_to_hf
from pertoken.folders.refusals import NotCovered
from pertoken.model.decoder import CausalLM
from pertoken.recipe.model import ModelConfig

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
    "qwen3": Qwen3Config,
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "olmo2": Olmo2Config,
    "olmo3": Olmo3Config,
    "phi3": Phi3Config,
    "granite": GraniteConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MIXTURES = {"qwen3": Qwen3MoeConfig, "qwen2": Qwen2MoeConfig, "llama": MixtralConfig, "olmoe": OlmoeConfig}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_survives_the_way_there_and_back(family):
    keys = {"family": family, "rope_theta": 777.0, "rms_norm_eps": 1e-5, "head_dim": 10}
    config = ModelConfig.model_validate(SHARED | keys).resolve(97)
    assert config_from_hf(config_to_hf(config, eos_token_id=2)) == config
    theirs = FAMILIES[family](**config_to_hf(config, eos_token_id=2))
    assert rope_of(theirs)["rope_theta"] == 777.0
    assert theirs.pad_token_id is None, "its embedding would be frozen"
    assert config_from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_survives_the_way_there_and_back(family):
    keys = {"family": family, "rms_norm_eps": 1e-5, "use_moe": True, "num_experts": 6, "num_experts_per_tok": 3}
    keys |= {} if family == "llama" else {"norm_topk_prob": False}
    keys |= {"moe_intermediate_size": 24} if family in ("qwen3", "qwen2") else {}
    config = ModelConfig.model_validate(SHARED | keys | {"aux_loss_coef": 0.125}).resolve(97)
    assert config_from_hf(config_to_hf(config, eos_token_id=2)) == config
    theirs = MIXTURES[family](**config_to_hf(config, eos_token_id=2))
    num_experts = getattr(theirs, "num_experts", None) or theirs.num_local_experts  # so in version 4, of Mixtral
    assert (num_experts, theirs.num_experts_per_tok, theirs.router_aux_loss_coef) == (6, 3, 0.125)
    assert config_from_hf(theirs.to_dict()) == config
    as_written_by_4 = theirs.to_dict() | {"num_experts": 6}
    if family == "qwen3":
        as_written_by_4.pop("num_local_experts", None)
    assert config_from_hf(as_written_by_4) == config


def test_scaled_rotary_frequencies_survive_the_way_there_and_back():
    keys = SHARED | {"family": "llama", "rope_theta": 777.0, "rope_scaling": LLAMA3}
    config = ModelConfig.model_validate(keys).resolve(97)
    values = config_to_hf(config, eos_token_id=2)
    assert config_from_hf(values) == config
    assert values["rope_parameters"] == {"rope_theta": 777.0} | LLAMA3
    as_read_by_4 = {key: value for key, value in values.items() if key != "rope_parameters"}
    assert (as_read_by_4["rope_scaling"], as_read_by_4["rope_theta"]) == (LLAMA3, 777.0)
    assert config_from_hf(as_read_by_4) == config
    theirs = LlamaConfig(**deepcopy(values))
    assert rope_of(theirs) == {"rope_theta": 777.0} | LLAMA3
    assert config_from_hf(theirs.to_dict()) == config
    assert rope_of(LlamaConfig(**as_read_by_4)) == rope_of(theirs)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 8.0},
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.2},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "phi3"])
def test_linear_and_yarn_scaling_survive_the_way_there_and_back_in_every_family(family, scaling):
    keys = SHARED | {"family": family, "rope_scaling": scaling}
    config = ModelConfig.model_validate(keys).resolve(97)
    values = config_to_hf(config, eos_token_id=2)
    assert config_from_hf(values) == config
    if family == "olmo2" and not VERSION_5:
        pytest.skip("transformers 4 has no such scaling for OLMo 2: its configuration takes fields of version 3 alone")
    as_read_by_4 = {key: value for key, value in values.items() if key != "rope_parameters"}
    assert as_read_by_4["rope_scaling"] == scaling
    assert config_from_hf(as_read_by_4) == config
    theirs, of_4 = (FAMILIES[family](**deepcopy(form)) for form in (values, as_read_by_4))
    full = rope_of(theirs)
    assert {key: full[key] for key in scaling} == scaling
    assert rope_of(of_4) == full
    assert config_from_hf(theirs.to_dict()) == config


def test_a_published_olmo3_is_read_with_a_window_in_three_of_four_layers_and_yarn_in_the_others():
    yarn = {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0}
    yarn |= {"original_max_position_embeddings": 8192, "rope_type": "yarn"}
    values = SHARED | {"model_type": "olmo3", "num_hidden_layers": 8, "rope_theta": 500000, "rope_scaling": yarn}
    config = config_from_hf(values | {"sliding_window": 4096})
    assert [kind.rope for kind in config.layer_kinds] == ["local", "local", "local", "global"] * 2
    assert (config.rope_local_base_freq, config.rope_scaling.model_dump(exclude_none=True)) == (5e5, yarn)
    assert config == config_from_hf(Olmo3Config(**deepcopy(values)).to_dict())


def test_a_published_phi4_mini_without_its_scaling_turns_three_quarters_of_each_head():
    values = SHARED | PHI3 | {"partial_rotary_factor": 0.75, "rope_scaling": None, "sliding_window": 262144}
    config = config_from_hf(values)
    assert (config.rotary_dim, config.layer_kinds[0].window) == (6, 262144)
    theirs = Phi3Config(**deepcopy(values))
    assert config_from_hf(theirs.to_dict()) == config_from_hf(config_to_hf(config)) == config
    assert rope_of(Phi3Config(**config_to_hf(config))) == rope_of(theirs)


@only_5
def test_of_two_sets_of_rotary_parameters_transformers_choice_counts():
    values = {**SHARED, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 3.0}
    config = config_from_hf(values)
    theirs = LlamaConfig(**deepcopy(values)).rope_parameters  # which writes into what it is given
    assert (config.rope_scaling.model_dump(exclude_none=True), config.rope_theta) == (LLAMA3, theirs["rope_theta"])
    assert theirs == LLAMA3 | {"rope_theta": 5e5}


# What the two checkpoints' own config.json say of their architecture.
PUBLISHED = {
    "Qwen2.5-0.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151643,
            "hidden_act": "silu",
            "hidden_size": 896,
            "initializer_range": 0.02,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "model_type": "qwen2",
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        494_032_768,
    ),
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": 128256,
        },
        1_235_814_400,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_are_our_decoder_s(name):
    values, num_parameters = PUBLISHED[name]
    config = config_from_hf(values)
    model = CausalLM(config, device="meta")
    assert config.num_parameters == model.num_parameters == num_parameters
    theirs = FAMILIES[values["model_type"]](**deepcopy(values))  # which writes into what it is given
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(theirs)
    shapes = {name: weight.shape for name, weight in expected.state_dict().items() if name != "lm_head.weight"}
    assert {name: weight.shape for name, weight in model.state_dict().items()} == shapes
    assert config_from_hf(theirs.to_dict()) == config
    again = config_to_hf(config)
    for key in ("hidden_size", "head_dim", "rope_theta", "rms_norm_eps", "max_position_embeddings"):
        assert again[key] == values.get(key, 64)  # Qwen2.5 leaves its head_dim out
    assert again["rope_scaling"] == values.get("rope_scaling")
    assert again["sliding_window" if "sliding_window" in values else "mlp_bias"] in (None, False)


def test_fields_of_transformers_4_are_read():
    values = {**SHARED, "model_type": "llama", "torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": None}
    assert config_from_hf(values).rope_theta == 5e5
    del values["rope_theta"], values["head_dim"], values["tie_word_embeddings"]
    config = config_from_hf(values)
    assert (config.rope_theta, config.head_dim, config.tie_word_embeddings) == (1e4, 8, False)


def test_absent_keys_mean_what_they_mean_to_transformers():
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for family, config_class in FAMILIES.items():
        values = {key: SHARED[key] for key in (*keys, "num_key_value_heads")}
        if family == "gemma3":  # or some layers would have a window
            values["layer_types"] = GEMMA3["layer_types"]
        if family == "olmo3" and not VERSION_5:
            continue  # its class has another rotary base there than in version 5, whose pertoken takes
        ours = config_from_hf({**values, "model_type": config_class.model_type})
        assert ours == config_from_hf(config_class(**values).to_dict())
    for config_class in MIXTURES.values():
        values = {key: SHARED[key] for key in keys}
        values |= {"num_attention_heads": 16, "hidden_size": 64}
        ours = config_from_hf({**values, "model_type": config_class.model_type})
        assert ours == config_from_hf(config_class(**values).to_dict())


def test_minimind_configurations_are_read():
    values = {"model_type": "minimind", "hidden_size": 96, "use_moe": False, "num_experts": 4, "head_dim": 12}
    config = config_from_hf(values)
    assert config.family == "qwen3"
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (8, 4, 320)
    assert (config.rope_theta, config.vocab_size, config.tie_word_embeddings) == (1e6, 6400, True)
    assert not config.use_moe
    config = config_from_hf({**values, "use_moe": True, "router_aux_loss_coef": 0.01})
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (4, 1, True)
    assert (config.use_moe, config.moe_intermediate_size, config.aux_loss_coef) == (True, 320, 0.01)


GEMMA3 = {"model_type": "gemma3_text", "layer_types": ["full_attention"] * 2}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e5}
YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_OF_4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
OLMO3 = {"model_type": "olmo3", "layer_types": ["full_attention"] * 2}
PHI3 = {"model_type": "phi3"}
REFUSED = [
    ({"model_type": "starcoder2"}, "model_type='starcoder2'"),
    ({"model_type": None}, "model_type=None"),
    ({"model_type": "qwen2_moe", "qkv_bias": False}, "qkv_bias=False"),
    ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "layer_types="),
    ({"model_type": "llama", "layer_types": ["sliding_attention"] * 2}, "layer_types="),
    ({"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 64}, "layer_types: missing"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}, "no_rope_layers: 3 entries"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
    ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias=True"),
    ({"model_type": "qwen2", "num_experts": 8}, "num_experts=8"),
    ({"model_type": "minimind", "rope_scaling": LLAMA3}, "rope_scaling="),
    ({"model_type": "qwen2", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling="),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2, "sliding_window": 8}, "use_sliding_window"),
    ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 2, "sliding_window": 8}, "layer_types="),
    ({"model_type": "mistral", "layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "layer_types="),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias=True"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling={'factor': 4.0"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling={'factor': 8.0,"),
    ({"model_type": "llama", "rope_scaling": LLAMA3 | {"more": 1}}, "rope_scaling={"),
    ({"model_type": "llama", "rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "rope_parameters={"),
    (
        {"model_type": "llama", "rope_scaling": LLAMA3, "original_max_position_embeddings": 8},
        "original_max_position_embeddings=8",
    ),
    ({"model_type": "llama", "rope_scaling": LLAMA3 | {"factor": 0.5}}, "rope_scaling.factor=0.5"),
    ({"model_type": "llama", "rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "high_freq_factor=1.0: must be more"),
    ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers=[0]"),
    ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ({"model_type": "qwen3_moe", "num_experts": 0}, "num_experts=0"),
    ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5"),
    ({"model_type": "qwen3_moe", "shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
    ({"model_type": "qwen3_moe", "n_shared_experts": 1}, "n_shared_experts=1"),
    ({"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 64}, "sliding_window=64"),
    ({"model_type": "mixtral", "sliding_window": 4096}, "sliding_window=4096"),
    ({"model_type": "mixtral", "norm_topk_prob": False}, "norm_topk_prob=False"),
    ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, "layer_types="),
    (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    (GEMMA3 | {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
    (GEMMA3 | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "rope_parameters={"),
    (GEMMA3 | {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": YARN}}, "sliding_attention"),
    (GEMMA3 | {"rope_parameters": {"full_attention": YARN | {"truncate": False}}}, "rope_parameters={"),
    (
        GEMMA3 | {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE | {"factor": 2.0}}},
        "sliding_attention",
    ),
    (GEMMA3 | {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling={"),
    (GEMMA3 | {"rope_scaling": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, "rope_scaling={"),
    (GEMMA3 | {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, "layer_types="),
    ({"model_type": "gemma3_text", "sliding_window": None}, "sliding_window=None"),
    ({"model_type": "gemma2", "sliding_window": None}, "sliding_window=None"),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    (OLMO3 | {"rope_theta": 1e4}, "rope_theta=10000.0"),
    (OLMO3 | {"rope_parameters": {"full_attention": PLAIN_ROPE}}, "rope_parameters={"),
    (
        OLMO3
        | {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE | {"rope_theta": 1.0}}},
        "rope_parameters={",
    ),
    ({"model_type": "llama", "rope_theta": 1.0, "rope_scaling": YARN_OF_4}, "rope_theta=1.0"),
    (PHI3 | {"rope_scaling": YARN_OF_4}, "rope_scaling={"),
    (PHI3 | {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "rope_scaling={"),
    (PHI3 | {"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4: 3 of 8"),
    (GEMMA3 | {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0"),
    ({"model_type": "granite", "residual_multiplier": -1.0}, "residual_multiplier=-1.0"),
    ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv=8.0"),
    ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act='silu'"),
    ({"model_type": "olmo2", "attention_bias": True}, "attention_bias=True"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling="),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}}, "rope_scaling="),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling.factor=0.5"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 16}}, "rope_scaling="),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope_parameters="),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "rope_parameters="),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters="),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"attention_bias": True}, "attention_bias=True"),
    ({"mlp_bias": True}, "mlp_bias=True"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
    ({"num_experts": 8}, "num_experts=8"),
    ({"num_local_experts": 8}, "num_local_experts=8"),
    ({"vocab_size": None}, "vocab_size: missing"),
    ({"num_key_value_heads": 4}, "num_key_value_heads=4"),
    ({"head_dim": 7}, "head_dim=7"),
    ({"hidden_size": "48"}, "hidden_size='48'"),
]


@pytest.mark.parametrize(("keys", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_the_decoder_lacks_is_refused_by_name(keys, named):
    with pytest.raises(ModelError) as caught:
        config_from_hf({**SHARED, "model_type": "qwen3", **keys})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"model_type": "yarn-rope", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": LLAMA3 | {"more": 1}},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 8},
        {"attention_bias": True},
    ],
    ids=str,
)
def test_what_transformers_may_have_is_left_to_it(keys):
    with pytest.raises(NotCovered):
        config_from_hf({**SHARED, "model_type": "llama", **keys})


@pytest.mark.parametrize(
    "keys",
    [
        {"sliding_window": 4096, "use_sliding_window": False},
        {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
        {"model_type": "llama", "rope_scaling": {"type": "default"}, "num_key_value_heads": None},
        {"layer_types": ["full_attention"] * 2, "use_sliding_window": True, "sliding_window": 4096},
        {"model_type": "gemma", "hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "default"}},
        {"attention_bias": False, "mlp_bias": None, "num_experts": 0},
    ],
    ids=str,
)
def test_what_is_switched_off_is_not_refused(keys):
    assert config_from_hf({**SHARED, "model_type": "qwen3", **keys}).vocab_size == 97


def test_null_key_value_heads_are_as_many_as_query_heads():
    values = SHARED | {"num_key_value_heads": None}
    for family, config_class in FAMILIES.items():
        if family in ("gemma", "gemma2", "gemma3"):  # whose classes take no null
            continue
        config = config_from_hf({**values, "model_type": config_class.model_type})
        assert config.num_key_value_heads == config_class(**values).num_key_value_heads == 6
