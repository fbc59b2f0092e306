"""Recipes: what is accepted, and what each refusal says."""

from __future__ import annotations

import copy
import json
import re

import pytest

from pertoken import Recipe
from pertoken.errors import RecipeError
from pertoken.recipe.schema import apply_override
from pertoken.recipe.starter import STARTERS

BASE = {"stage": "sft", "out_dir": "runs/x", "data": {"path": "chats.jsonl", "tokenizer": "tok"}}


def parse(*overrides: str) -> Recipe:
    values = copy.deepcopy(BASE)
    for override in overrides:
        apply_override(values, override)
    return Recipe.parse(values)


REFUSED = {
    "train.batch_size=0": "train.batch_size=0: must be at least 1",
    "train.batchsize=3": "train.batchsize: unknown key; did you mean train.batch_size?",
    "data.batch_size=3": "data.batch_size: unknown key; did you mean train.batch_size?",
    "zzz=3": "zzz: unknown key; see the README",
    "train.batch_size=1.5": "train.batch_size=1.5: must be a whole number",
    'train.batch_size="8"': "train.batch_size='8': must be a whole number, written without quotes",
    "train.learning_rate=fast": "train.learning_rate='fast': must be a finite number",
    "train.learning_rate=nan": "train.learning_rate=nan: must be a finite number",
    "train.learning_rate=0": "train.learning_rate=0: must be more than 0",
    "train.betas=[0.9, 1.0]": "train.betas=[0.9, 1.0]: each must be at least 0 and below 1",
    "train.optimizer=lion": "train.optimizer='lion': must be one of 'adamw', 'muon'",
    "train.muon_learning_rate=0.01": 'train.muon_learning_rate=0.01: train.optimizer="adamw" does not use it; set',
    "train.dtype=fp16": "train.dtype='fp16': must be one of",
    "train.device=tpu": "train.device='tpu': must be",
    "train.epochs=0": "train.epochs=0: must be more than 0",
    "train.epochs=many": "train.epochs='many': must be a finite number, written without quotes",
    "train.warmup_steps=0.03": "train.warmup_steps=0.03: must be a whole number; a share of all steps is",
    "train.warmup_ratio=1.0": "train.warmup_ratio=1.0: must be less than 1",
    "train.min_lr_ratio=2": "train.min_lr_ratio=2: must be at most 1",
    "model.num_attention_heads=7": "model.num_attention_heads=7: does not divide model.hidden_size=512",
    "model.num_key_value_heads=3": "model.num_key_value_heads=3: does not divide model.num_attention_heads=8",
    "model.head_dim=3": "model.head_dim=3: must be even",
    "model.num_experts=8": "model.num_experts=8: model.use_moe is false; set it to true, or leave num_experts out",
    "model.aux_loss=none": "model.aux_loss=none: model.use_moe is false",
    "model.aux_loss=batch": "model.aux_loss='batch': must be one of",
    "model.aux_loss_coef=-1": "model.aux_loss_coef=-1: must be at least 0",
    "model.tie_word_embeddings=yes": "model.tie_word_embeddings='yes': must be true or false",
    "model.family=qwen4": "model.family='qwen4': no such family; did you mean \"qwen3\"? There are qwen3, qwen2, llama",
    "model.family=zzz": "model.family='zzz': no such family; There are qwen3, qwen2, llama",
    "model.family=mixtral": "model.family='mixtral': write \"llama\", with model.use_moe = true for experts",
    "model.rope_scaling=yarn": "model.rope_scaling='yarn': must be a section, [model.rope_scaling]",
    "data=3": "data=3: must be a section, [data]",
    "data.path=[]": "data.path: missing; name the data",
    "data.eval_fraction=1.0": "data.eval_fraction=1.0: must be less than 1",
    "data.max_seq_len=0": "data.max_seq_len=0: must be at least 2",
    "data.max_seq_len=99999": "data.max_seq_len=99999: longer than model.max_position_embeddings=32768",
    "data.format=text": 'data.format="text": stage = "sft" reads conversations',
    "data.eval_split=tail": 'data.eval_split="tail": only raw text has a tail',
    "stage=dpo": "stage='dpo': must be one of 'pretrain' or 'sft'",
    'log.trackers=["mlflow"]': "log.trackers.0='mlflow': must be one of",
    "adapter.kind=dora": "adapter.kind='dora': must be one of 'none' or 'lora'",
    "adapter.kind=lora": 'adapter.kind="lora": the weights that it leaves frozen would be random ones; set init_from',
    "adapter.r=8": 'adapter.r=8: adapter.kind is "none"; set adapter.kind="lora", or leave the key out',
    "adapter.dropout=0.05": "adapter.dropout=0.05: must be 0; with dropout a step's gradient would depend on how",
    "adapter.targets=lm_head": "adapter.targets='lm_head': lm_head cannot be adapted",
    'adapter.targets="*proj"': "adapter.targets='*proj': '*proj' is no name of a module",
    'adapter.targets=["all-linear", "q_proj"]': "adapter.targets=['all-linear', 'q_proj']: \"all-linear\" are all",
    "model.frozen_dtype=bfloat16": 'model.frozen_dtype="bfloat16": without an adapter nothing is frozen',
}


REFUSED_OF_AN_ADAPTER = {
    "init_from=out/sft.pth": "init_from=out/sft.pth: an adapter's folder names a Hugging Face folder as its base",
    "train.optimizer=muon": 'train.optimizer="muon": Muon is for whole matrices, not for the factors of an adapter',
    "model.frozen_dtype=bfloat16": 'model.frozen_dtype="bfloat16": with train.dtype="float32" the frozen weights',
}


@pytest.mark.parametrize("override", REFUSED_OF_AN_ADAPTER)
def test_what_an_adapter_cannot_be_trained_with_is_refused(override):
    lora = ("init_from=runs/base", "adapter.kind=lora", "train.dtype=float32")
    assert parse(*lora).adapter.targets == ("all-linear",)
    assert parse(*lora, "adapter.targets=q_proj").adapter.targets == ("q_proj",)
    assert parse(*lora).train.learning_rate == 10 * parse().train.learning_rate == 2e-4
    with pytest.raises(RecipeError) as refusal:
        parse(*lora, override)
    assert str(refusal.value).startswith(REFUSED_OF_AN_ADAPTER[override])


NEAREST = {
    "train.optimizer=adanw": "train.optimizer='adanw': must be one of 'adamw', .*; did you mean 'adamw'\\?",
    "train.engine=plane": "train.engine='plane': must be one of 'auto', .*; did you mean 'plain'\\?",
    "log.trackers=wanbd": "log.trackers.0='wanbd': must be one of .*'tensorboard', .*; did you mean 'wandb'\\?",
}


@pytest.mark.parametrize("override", NEAREST)
def test_a_name_that_is_none_is_answered_with_all_and_the_nearest(override):
    with pytest.raises(RecipeError) as refusal:
        parse(override)
    assert re.fullmatch(NEAREST[override], str(refusal.value))


@pytest.mark.parametrize("override", REFUSED)
def test_each_refusal_is_one_line_with_key_value_and_remedy(override):
    with pytest.raises(RecipeError) as refusal:
        parse(override)
    message = str(refusal.value)
    assert message.startswith(REFUSED[override])
    assert "\n" not in message


def test_all_problems_are_told_at_once():
    with pytest.raises(RecipeError) as refusal:
        parse("train.batch_size=0", "train.epoch=3", "log.log_interval=-1")
    lines = str(refusal.value).splitlines()
    assert len(lines) == 3
    assert "train.epoch: unknown key; did you mean train.epochs?" in lines


def test_missing_sections_are_named():
    with pytest.raises(RecipeError, match=r"data\.path: missing"):
        Recipe.parse({"stage": "sft", "out_dir": "x", "data": {"tokenizer": "t"}})
    with pytest.raises(RecipeError, match=r"data\.tokenizer: missing"):
        Recipe.parse({"stage": "sft", "out_dir": "x", "data": {"path": "p"}})


@pytest.mark.parametrize("override", ["train.batch_size", "=3", ""])
def test_what_is_not_an_override_says_how_to_write_one(override):
    with pytest.raises(RecipeError, match="key=value"):
        parse(override)


def test_an_override_through_a_value_is_refused():
    with pytest.raises(RecipeError, match="stage is not a section"):
        parse("stage.x=3")


def test_overrides_are_toml_and_text_keys_take_text():
    recipe = parse(
        "out_dir=2024",
        "train.learning_rate=3e-4",
        'data.path=["a.jsonl", "b.jsonl"]',
        "model.tie_word_embeddings=false",
        "data.template_kwargs.enable_thinking=false",
        "train.max_steps=7",
    )
    assert recipe.out_dir == "2024"
    assert recipe.train.learning_rate == 3e-4
    assert recipe.data.path == ("a.jsonl", "b.jsonl")
    assert recipe.model.tie_word_embeddings is False
    assert recipe.data.template_kwargs == {"enable_thinking": False}
    assert recipe.train.max_steps == 7


def test_warm_up_is_given_once():
    with pytest.raises(RecipeError, match=r"^train\.warmup_ratio=0\.1: train\.warmup_steps=5 is given too; keep one"):
        parse("train.warmup_ratio=0.1", "train.warmup_steps=5")
    assert Recipe.parse(parse("train.warmup_ratio=0.1").model_dump()).train.warmup_ratio == 0.1, (
        "resolved: with 0 steps"
    )


@pytest.mark.parametrize(("written", "kept"), [("2", "2"), ("2.0", "2"), ("0.5", "0.5")])
def test_epochs_are_kept_as_whole_numbers_where_they_are(written, kept):
    recipe = parse(f"train.epochs={written}")
    assert f"epochs = {kept}\n" in recipe.to_toml()
    assert json.dumps(recipe.model_dump(mode="json")["train"]["epochs"]) == kept


def test_a_recipe_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse().out_dir = "elsewhere"


def test_the_resolved_recipe_reads_back_the_same(tmp_path):
    recipe = parse("train.betas=[0.8, 0.99]", "data.template_kwargs.x=1", "init_from=runs/pre")
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    assert Recipe.load(path) == recipe


@pytest.mark.parametrize("stage", STARTERS)
def test_the_starter_recipes_are_valid(stage, tmp_path):
    path = tmp_path / "starter.toml"
    path.write_text(STARTERS[stage])
    assert Recipe.load(path).stage == stage


def test_the_learning_rate_left_out_is_the_stages_own():
    assert parse().train.learning_rate == 2e-5
    assert parse("stage=pretrain").train.learning_rate == 5e-4


@pytest.mark.parametrize("text", ["stage = ", "stage = 'sft'\nstage = 'sft'"])
def test_broken_toml_says_where(text, tmp_path):
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.toml: not valid TOML"):
        Recipe.load(path)


def test_a_recipe_that_is_not_there_says_what_prints_one(tmp_path):
    with pytest.raises(RecipeError, match="pertoken new sft"):
        Recipe.load(tmp_path / "none.toml")


ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SCALED = [f"model.rope_scaling.{key}={value}" for key, value in ROPE.items()]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.family=llama", *SCALED[:-1]], 'original_max_position_embeddings: missing, and rope_type="llama3"'),
        (
            ["model.family=llama", *SCALED, "model.rope_scaling.rope_type=dynamic"],
            "model.rope_scaling.rope_type='dynamic': must be one of 'llama3', 'linear' or 'yarn'",
        ),
        ([*SCALED, "model.rope_scaling.rope_type=yarn"], 'rope_type="yarn" has none; leave it out'),
        (["model.family=llama", *SCALED, "model.rope_scaling.factor=0.5"], "model.rope_scaling.factor=0.5: must be at"),
        (["model.family=llama", *SCALED, "model.rope_scaling.high_freq_factor=1"], "model.rope_scaling"),
        (
            ["model.family=llama", *SCALED, "model.rope_scaling.factr=8"],
            "model.rope_scaling.factr: unknown key; did you mean model.rope_scaling.factor?",
        ),
        (["model.family=olmo2", "model.use_moe=true"], 'model.use_moe=True: model.family="olmo2" has no such models'),
    ],
)
def test_features_that_a_family_has_not_are_refused(overrides, message):
    with pytest.raises(RecipeError) as refusal:
        parse(*overrides)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("model.")
    assert "\n" not in str(refusal.value)


def test_a_scaling_of_rotary_frequencies_survives_the_recipe_on_disk(tmp_path):
    recipe = parse("model.family=llama", *SCALED)
    assert recipe.model.rope_scaling.model_dump(exclude_none=True) == {"rope_type": "llama3", **ROPE}
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert Recipe.load(tmp_path / "recipe.toml") == recipe
    assert recipe.model.resolve(6400).rope_scaling == recipe.model.rope_scaling


MIXTURES_REFUSED = {
    ("model.num_experts_per_tok=5",): "model.num_experts_per_tok=5: more than model.num_experts=4",
    (
        "model.num_experts=2",
        "model.num_experts_per_tok=3",
    ): "model.num_experts_per_tok=3: more than model.num_experts=2",
    ("model.family=llama", "model.norm_topk_prob=false"): "model.norm_topk_prob=False: model.family=",
    (
        "model.family=llama",
        "model.intermediate_size=64",
        "model.moe_intermediate_size=32",
    ): "model.moe_intermediate_size=32: mixtral",
}


@pytest.mark.parametrize("overrides", MIXTURES_REFUSED)
def test_what_no_mixture_can_be_is_refused(overrides):
    with pytest.raises(RecipeError) as refusal:
        parse("model.use_moe=true", *overrides)
    assert str(refusal.value).startswith(MIXTURES_REFUSED[overrides])
    assert "\n" not in str(refusal.value)


def test_a_loaded_model_may_have_the_experts_that_a_recipe_only_mentions():
    recipe = parse("init_from=runs/moe", "model.aux_loss=none", "model.num_experts_per_tok=8")
    assert (recipe.model.aux_loss, recipe.model.num_experts_per_tok) == ("none", 8)


def test_derived_keys_of_a_mixture():
    config = parse("model.use_moe=true", "model.hidden_size=768").model.resolve(6400)
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (4, 1, True)
    assert (config.moe_intermediate_size, config.aux_loss, config.aux_loss_coef) == (2432, "sequence", 5e-4)
    config = parse("model.use_moe=true", "model.family=llama", "model.moe_intermediate_size=64").model.resolve(6400)
    assert (config.intermediate_size, config.moe_intermediate_size, config.rope_theta) == (64, 64, 1e6)


def test_derived_model_keys():
    config = parse("model.hidden_size=768", "model.family=llama").model.resolve(6400)
    assert (config.head_dim, config.num_key_value_heads, config.intermediate_size) == (96, 8, 2432)
    assert (config.vocab_size, config.rope_theta) == (6400, 1e4)
    assert (config.qk_norm, config.qkv_bias) == (False, False)


def test_what_a_family_multiplies_by_is_for_that_family_alone():
    config = parse("model.family=granite", "model.logits_scaling=8.0").model.resolve(6400)
    assert (config.embedding_scale, config.residual_multiplier, config.logits_scaling) == (1.0, 1.0, 8.0)
    assert (config.attention_scale, config.attention_multiplier) == (64**-0.5, 64**-0.5)
    config = parse("model.family=gemma3", "model.query_pre_attn_scalar=256").model.resolve(6400)
    assert (config.embedding_scale, config.attention_scale) == (512**0.5, 1 / 16)
    for given in ("logits_scaling=8.0", "attention_multiplier=1.0", "query_pre_attn_scalar=1"):
        with pytest.raises(RecipeError, match=rf"^model\.{given}: qwen2 models have none; leave the key out"):
            parse("model.family=qwen2", f"model.{given}")


def test_a_family_brings_its_features_and_its_defaults():
    found = {}
    for name in ("qwen3", "qwen2", "llama"):
        config = parse(f"model.family={name}").model.resolve(6400)
        found[name] = (config.qk_norm, config.qkv_bias, config.rope_theta)
    assert found == {"qwen3": (True, False, 1e6), "qwen2": (False, True, 1e6), "llama": (False, False, 1e4)}
