"""Families that our decoder lacks, through transformers' own models: the same objective, or a refusal by name."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_versions import rope_keys, with_rope
from tiny import World, pertoken, rows_of, untimed

from pertoken import load_model, train
from pertoken.data.batch.order import step_at
from pertoken.data.batch.pack import Sample, collate
from pertoken.data.batch.share import share_of_all
from pertoken.data.tokens.tokenizer import load_tokenizer
from pertoken.engines.choose import choose_engine
from pertoken.errors import ModelError, RecipeError
from pertoken.folders.open import resize_embeddings
from pertoken.hf_fallback.model import FallbackLM
from pertoken.inference.generate import generate
from pertoken.model.decoder import CausalLM
from pertoken.model.execution import Execution
from pertoken.objective.logit_map import PLAIN_LOGITS
from pertoken.runs.data import prepare
from pertoken.training.evaluate import evaluate
from pertoken.training.precision import Precision
from pertoken.training.step import TrainState, train_step

pytestmark = pytest.mark.numeric

NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    **NO_TOKENS,
}
COHERE = {key: value for key, value in SIZES.items() if key != "head_dim"}
# Dropout as GPT-2 and Cohere have it, or more; Cohere 2 has windows in one layer, and shorter than the samples.
TRAINS = {
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, **NO_TOKENS}),
    "cohere": ("Cohere", {**COHERE, "attention_dropout": 0.1}),
    "cohere2": (
        "Cohere2",
        {**COHERE, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 4, "sliding_window": 16}),
    "gemma2": ("Gemma2", {**SIZES, "final_logit_softcapping": 3.0, "hidden_activation": "gelu"}),
    "llama-biases": ("Llama", {**SIZES, "mlp_bias": True}),
}


def make_folder(world: World, folder: Path, name: str, keys: dict[str, Any]) -> Path:
    """A random model of transformers' class for `name`, with the world's tokenizer."""
    import transformers

    tokenizer = load_tokenizer(world.folder / "tokenizer")
    keys = {**with_rope(keys), "vocab_size": len(tokenizer), "initializer_range": 0.1}
    config = getattr(transformers, f"{name}Config")(**keys)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("foreign")
    return {key: make_folder(world, root / key, *what) for key, what in TRAINS.items()}


def random_samples(lengths: list[int], vocab_size: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(0, vocab_size, n + 1), rng.random(n) < rng.random()) for n in lengths]


@pytest.mark.parametrize("name", TRAINS)
def test_ten_steps_are_those_of_a_plain_loop_over_transformers(world, folders, tmp_path, name):
    from transformers import AutoModelForCausalLM

    recipe = world.recipe(
        tmp_path / "run",
        model={"aux_loss": "none"} if name == "mixtral" else {},
        init_from=str(folders[name]),
        train__max_steps=10,
        train__schedule="constant",
        train__micro_batch_tokens=1500,
    )
    train(recipe)
    ours = rows_of(tmp_path / "run")
    assert min(row["micro_batches"] for row in ours[:6]) >= 3

    store, _ = prepare(recipe)
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)  # in eval mode: nothing drops out
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for step in range(1, 11):
        samples = [store[int(i)] for i in step_at(step, num_samples=len(store), batch_size=16, seed=42).sample_ids]
        num_tokens = sum(int(s.loss_mask.sum()) for s in samples)
        total = 0.0
        for sample in samples:  # one at a time, so nothing is padded
            tokens = torch.from_numpy(sample.tokens.astype(np.int64))
            logits = model(input_ids=tokens[None, :-1]).logits[0]
            mask = torch.tensor(sample.loss_mask)
            loss = F.cross_entropy(logits[mask], tokens[1:][mask], reduction="sum") / num_tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert ours[step - 1]["loss"] == pytest.approx(total, rel=1e-5)
        assert ours[step - 1]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


REFUSED = {
    "Phi": ({k: v for k, v in SIZES.items() if k != "head_dim"}, "its head has a bias"),
    "Gemma3Text": ({**SIZES, "use_bidirectional_attention": True}, "depend on the tokens after it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_another_loss_is_refused_by_name(world, tmp_path, name):
    keys, named = REFUSED[name]
    folder = make_folder(world, tmp_path / "model", name, keys)
    recipe = world.write_recipe(tmp_path / "recipe", model={}, init_from=str(folder))
    code, _, err = pertoken("train", recipe, f"out_dir={tmp_path / 'run'}")
    assert code == 2
    assert named in err
    assert str(folder) in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("overrides", [[], ["model.aux_loss=sequence"]], ids=str)
def test_a_mixture_trains_without_a_balance_loss_or_not_at_all(world, folders, tmp_path, overrides):
    recipe = world.write_recipe(tmp_path / "recipe", model={}, init_from=str(folders["mixtral"]))
    code, _, err = pertoken("train", recipe, f"out_dir={tmp_path / 'run'}", *overrides)
    assert code == 2
    assert 'model.aux_loss="sequence": mixtral (transformers) is a mixture of experts' in err
    assert not (tmp_path / "run").exists()
    model = load_model(folders["mixtral"])
    with pytest.raises(RecipeError, match=r'set model\.aux_loss to "none"'):
        model(collate(random_samples([9], model.facts.vocab_size)))
    of_experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert model.num_parameters - model.num_active_parameters == of_experts // 2


def test_a_soft_cap_far_above_an_untrained_models_logits_is_found(world, tmp_path, monkeypatch):
    """The logits themselves are all but unchanged by it, so comparing losses would not show one that we do not know."""
    from transformers import AutoModelForCausalLM

    from pertoken.hf_fallback.head import check_logits

    folder = make_folder(world, tmp_path, "Gemma2", {**SIZES, "final_logit_softcapping": 50.0})
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    assert model(input_ids=torch.arange(8)[None]).logits.abs().max() < 0.1
    check_logits(model)
    monkeypatch.setattr("pertoken.hf_fallback.head.logit_map_of", lambda model: PLAIN_LOGITS)
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM: final_logit_softcapping=50\.0"):
        check_logits(model)
    model.config.final_logit_softcapping = None
    check_logits(model)


def test_a_model_that_still_drops_out_is_refused(folders, monkeypatch):
    """Rates that only a module's own attribute holds would escape the configuration."""
    from pertoken.hf_fallback import load

    assert load_model(folders["cohere"]).hf.model.layers[0].self_attn.attention_dropout == 0.0
    monkeypatch.setattr(load, "_switch_off_dropout", lambda config: None)
    with pytest.raises(ModelError, match="something drops out"):
        load_model(folders["cohere"])


def test_dropout_that_is_not_in_the_configuration_is_switched_off_too(folders):
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    assert hf.transformer.drop.p == 0.1
    model = FallbackLM(hf)
    assert hf.transformer.drop.p == 0.0
    micro_batch = collate(random_samples([40, 9], model.facts.vocab_size))
    assert torch.equal(model.train()(micro_batch).loss_sum, model.eval()(micro_batch).loss_sum)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> FallbackLM:
    """As `model.aux_loss = "none"` lets it train."""
    model = load_model(folder, dtype=dtype)
    assert isinstance(model, FallbackLM)
    if (balance_loss := model.facts.balance_loss) is not None:
        model.set_balance_loss(replace(balance_loss, kind="none"))
    return model


@pytest.mark.parametrize("name", TRAINS)
def test_no_dropout_rate_is_left_and_training_mode_computes_what_evaluation_does(folders, name):
    model = opened(folders[name])
    assert isinstance(model, FallbackLM)
    assert {n for n, p in model.named_parameters() if p.data_ptr() % 64} == set(), "products depend on where they lie"
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {0.0}
    rates = {k: v for k, v in model.hf.config.to_dict().items() if "drop" in k and isinstance(v, float)}
    assert set(rates.values()) == {0.0}
    micro_batch = collate(random_samples([40, 9], model.facts.vocab_size))
    assert torch.equal(model.train()(micro_batch).loss_sum, model.eval()(micro_batch).loss_sum)


# Transformers' other norms compute in float32 whatever comes in, and keep its precision.
TOLERANCE = {"gpt2": 1e-10, "cohere": 1e-5, "mixtral": 1e-5}


@pytest.mark.parametrize("name", TOLERANCE)
def test_the_split_changes_no_float64_gradient(folders, name):
    model = opened(folders[name], dtype=torch.float64)
    samples = random_samples([1, 7, 128, 129, 30, 30, 3], model.facts.vocab_size)

    def gradients(split: list[list[int]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for part in split:
            model(collate([samples[i] for i in part])).objective({"supervised": 50}).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    whole = gradients([[0, 1, 2, 3, 4, 5, 6]])
    for split in ([[6], [5], [4], [3], [2], [1], [0]], [[3, 0, 5], [], [1, 2, 4], [6]]):
        for key, gradient in gradients(split).items():
            error = (gradient - whole[key]).abs().max() / whole[key].abs().max()
            assert error < TOLERANCE[name], (key, float(error))


@pytest.mark.parametrize("name", TRAINS)
def test_an_empty_micro_batch_gives_zeros_and_every_parameter_a_zero_gradient(folders, name):
    model = opened(folders[name])
    out = model(collate([]))
    assert (out.loss_sum.item(), out.num_tokens.item()) == (0.0, 0)
    out.objective({"supervised": 1}).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert not parameter.grad.any(), key


def test_padded_rows_are_counted_as_padding(folders):
    """Of GPT-2: every row of the rectangle meets the blocks, supervised ones the head."""
    model = load_model(folders["gpt2"])
    samples = random_samples([9, 5], model.facts.vocab_size)
    micro_batch = collate(samples)
    padding, total = (float(x) for x in model(micro_batch).metrics["padding"])
    body = model.num_parameters - model.head_weight.numel()  # tied
    supervised = sum(int(s.loss_mask.sum()) for s in samples)
    assert padding == 6 * body * 4
    assert total == 6 * body * 18 + 6 * model.head_weight.numel() * supervised


def test_the_padding_token_learns(world, tmp_path):
    """Transformers freezes its embedding; here it may be the end token, which chats are full of."""
    keys = {**COHERE, "pad_token_id": 5, "tie_word_embeddings": False}
    model = load_model(make_folder(world, tmp_path, "Cohere", keys))
    model(collate([Sample(np.array([5, 5, 6, 5]), np.ones(3, bool))])).loss_sum.backward()
    assert model.hf.get_input_embeddings().weight.grad[5].abs().max() > 0


@pytest.mark.parametrize("name", ["gpt2", "cohere2"])
def test_resume_is_bitwise(world, folders, tmp_path, name):
    recipe = world.write_recipe(
        tmp_path / "recipe",
        model={},
        init_from=str(folders[name]),
        train__max_steps=8,
        train__micro_batch_tokens=2000,
        checkpoint__save_interval=3,
        checkpoint__keep_last=9,
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert pertoken("train", recipe, f"out_dir={whole}")[0] == 0
    shutil.copytree(whole, broken, symlinks=True)
    for step in (6, 8):
        shutil.rmtree(broken / "checkpoints" / f"step-{step:08d}")
    code, _, err = pertoken("train", recipe, f"out_dir={broken}", "--resume")
    assert code == 0, err
    assert untimed(rows_of(broken)) == untimed(rows_of(whole))
    for file in ("model.safetensors", "optimizer.safetensors", "config.json"):
        assert (broken / "checkpoints/step-00000008" / file).read_bytes() == (
            whole / "checkpoints/step-00000008" / file
        ).read_bytes()


@pytest.fixture(scope="module")
def run(world: World, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2, fine-tuned for thirty steps."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(world.recipe(out, model={}, init_from=str(folders["gpt2"]), train__max_steps=30, data__add_tokens=["<new>"]))
    return out


def test_a_checkpoint_opens_in_transformers_with_equal_logits(world, run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = run / "checkpoints" / "step-00000030"
    ours, theirs = load_model(run), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(20)
    micro_batch = collate([Sample(np.arange(21), np.ones(20, bool))])
    assert torch.allclose(
        ours.logits(ours.hidden_states(micro_batch)), theirs(input_ids=ids[None]).logits[0], atol=1e-5
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == tokenizer.convert_tokens_to_ids(
        "<|im_end|>"
    )
    assert theirs.config.vocab_size == len(tokenizer) == len(load_tokenizer(world.folder / "tokenizer")) + 1


def test_it_learns_and_its_evaluation_is_a_sum_over_all_tokens(run, world):
    rows = rows_of(run)
    assert rows[0]["loss"] - rows[-1]["loss"] > 1
    code, _, err = pertoken("eval", run, world.folder / "held-out.jsonl", "--json", run / "eval.json")
    assert code == 0, err
    assert json.loads((run / "eval.json").read_text())["loss"] == pytest.approx(rows[-1]["eval_loss"], rel=1e-6)


def test_the_other_commands_take_it(run, world, tmp_path):
    code, text, err = pertoken("generate", run, "--prompt", "red", "--max-new-tokens", 5)
    assert code == 0, err
    assert text
    assert pertoken("inspect", run, world.folder / "held-out.jsonl")[0] == 0
    code, _, err = pertoken("export", run, "--format", "hf", "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = load_model(run).state_dict(), load_model(tmp_path / "out").state_dict()
    for name, weight in before.items():
        assert torch.equal(weight.bfloat16().float(), after[name]), name
    code, _, err = pertoken("export", run, "--format", "minimind", "--out", tmp_path / "out.pth")
    assert code == 2
    assert "gpt2 (transformers)" in err


@pytest.mark.parametrize("name", TRAINS)
def test_generation_with_a_cache_is_generation_without(folders, name):
    model = load_model(folders[name])
    prompt = list(range(4, 24))
    cached = list(generate(model, prompt, max_new_tokens=12))
    assert cached == list(generate(model, prompt, max_new_tokens=12, use_cache=False))


def test_a_family_without_such_a_cache_computes_the_sequence_anew(folders, monkeypatch):
    model = load_model(folders["gpt2"])
    prompt = list(range(4, 24))
    cached = list(generate(model, prompt, max_new_tokens=12))
    base = model.hf.base_model
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache))
    assert list(generate(model, prompt, max_new_tokens=12)) == cached


def test_new_tokens_start_as_the_mean_of_the_old(folders):
    model = load_model(folders["cohere"])
    old = model.head_weight.detach().clone()
    state = torch.get_rng_state()
    resize_embeddings(model, len(old) + 3)
    assert model.facts.vocab_size == len(old) + 3
    assert torch.equal(model.head_weight[: len(old)], old)
    assert torch.allclose(model.head_weight[len(old) :], old.mean(0).expand(3, -1))
    assert torch.equal(torch.get_rng_state(), state)


def test_activation_checkpointing_changes_no_gradient_and_engines_are_refused(folders):
    model = load_model(folders["gpt2"]).train()
    micro_batch = collate(random_samples([30, 9], model.facts.vocab_size))
    found = []
    for on in (False, True):
        model.zero_grad()
        model(micro_batch, Execution(activation_checkpointing=on)).loss_sum.backward()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == on
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for engine in ("cpu", "compile"):
        with pytest.raises(
            RecipeError, match=rf'train\.engine="{engine}": .* own decoder; set it to "auto" or "plain"'
        ):
            choose_engine(model, engine, dtype="float32", device=torch.device("cpu"), total_steps=1)


def test_rotary_angles_that_depend_on_the_longest_sample_end_where_they_begin_to(world, tmp_path):
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    folder = make_folder(world, tmp_path / "model", "Llama", {**SIZES, "rope_parameters": rope})
    assert load_model(folder).facts.max_position_embeddings == 64
    recipe = world.write_recipe(tmp_path / "recipe", model={}, init_from=str(folder))
    code, _, err = pertoken("train", recipe)
    assert code == 2
    assert "max_position_embeddings=64" in err


def break_folder(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    if how == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif how == "missing":
        config["n_layer"] = 3
    elif how == "left over":
        config["n_layer"] = 1
    elif how == "shape":
        config["n_positions"] = 512
    elif how == "own code":
        config |= {"model_type": "theirs", "auto_map": {"AutoModelForCausalLM": "modeling.Theirs"}}
        (folder / "modeling.py").write_text("raise SystemExit('their code ran')")
    elif how == "quantized":
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config))


BROKEN = {
    "pickle": "pytorch_model.bin: pertoken does not unpickle",
    "missing": "missing keys: transformer.h.2",
    "left over": "unexpected keys: transformer.h.1",
    "shape": "transformers cannot open it",
    "own code": "model_type='theirs'",
    "quantized": "quantization_config",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused_by_name_in_one_line(folders, tmp_path, how):
    folder = tmp_path / "model"
    shutil.copytree(folders["gpt2"], folder)
    break_folder(folder, how)
    with pytest.raises(ModelError) as caught:
        load_model(folder)
    assert BROKEN[how] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_scaled_qwen2_of_few_layers_loads_with_the_logits_of_transformers(tmp_path, layers):
    """Its max_window_layers is 28 by default, and means nothing without windows."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, bos_token_id=0, eos_token_id=1,
        **rope_keys({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    )  # fmt: skip
    assert config.max_window_layers > layers
    assert not config.use_sliding_window
    with torch.random.fork_rng():
        theirs = Qwen2ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_window_layers"] == config.max_window_layers
    ours = load_model(tmp_path).eval()
    assert isinstance(ours, FallbackLM)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(ours.hf(input_ids=ids).logits, theirs(input_ids=ids).logits)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("name", "keys"),
    [("Llama", {}), ("Qwen2", {}), ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}})],
    ids=["Llama", "Qwen2", "Llama 3"],
)
def test_a_covered_family_keeps_our_own_decoder(world, tmp_path, name, keys):
    folder = make_folder(world, tmp_path, name, {**SIZES, **keys})
    assert isinstance(load_model(folder), CausalLM)


def test_a_model_with_fused_matrices_is_ours_and_transformers_for_an_adapter(world, tmp_path):
    folder = make_folder(world, tmp_path, "Phi3", SIZES)
    assert isinstance(load_model(folder), CausalLM)
    assert isinstance(load_model(folder, for_adapter=True), FallbackLM)
    folder = make_folder(world, tmp_path, "Llama", SIZES)
    assert isinstance(load_model(folder, for_adapter=True), CausalLM)


def test_the_recipe_that_a_run_wrote_runs_again(run, tmp_path):
    code, _, err = pertoken("train", run / "recipe.toml", f"out_dir={tmp_path / 'again'}", "train.max_steps=1")
    assert code == 0, err


def test_the_architecture_is_not_for_the_recipe_to_say(world, folders, tmp_path):
    recipe = world.recipe(tmp_path / "run", model={"num_key_value_heads": 2}, init_from=str(folders["gpt2"]))
    with pytest.raises(RecipeError, match=r"model\.num_key_value_heads=2: .* leave the key out"):
        train(recipe)


def test_a_step_of_ours_and_evaluation_take_the_module_as_it_is(world, folders, tmp_path):
    model = load_model(folders["gpt2"])
    store, _ = prepare(world.recipe(tmp_path, model={}, init_from=str(folders["gpt2"])))
    precision = Precision("bfloat16", torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainState(model, optimizer, precision.new_scaler(), precision)
    samples = [store[i] for i in range(4)]
    before = evaluate(model, store, precision, token_budget=4000).loss
    for _ in range(3):
        metrics = train_step(
            state,
            share_of_all([collate(samples[:1]), collate([]), collate(samples[1:])]),
            lr=0.1,
            max_norm=1.0,
        )
        assert math.isfinite(metrics.grad_norm)
    assert evaluate(model, store, precision, token_budget=4000).loss < before
