"""`pertoken prove` as its users see it."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mutants
import pytest
import torch
from tiny import pertoken

from pertoken import Recipe, train
from pertoken.engines.cpu import attention as cpu_attention
from pertoken.errors import RecipeError
from pertoken.objective import cross_entropy
from pertoken.prove import paths, plain_update, run
from pertoken.prove.case import Case
from pertoken.prove.plain_update import PlainOptimizer
from pertoken.prove.report import Gradient, Result, compare
from pertoken.prove.run import NAMES, prove
from pertoken.prove.samples import LONG, choose
from pertoken.recipe.train import TrainConfig
from pertoken.runs.data import prepare

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).parents[2]
MOE = {"model__use_moe": True, "model__num_experts": 4, "model__num_experts_per_tok": 2}
ON_DEVICE = [name for name in NAMES if name.startswith("on the device")]
IN_ONE_PROCESS = [name for name in NAMES if "ranks" not in name and name not in ("compiled", *ON_DEVICE)]


# Both are of the compiler's own doing: what it imports, and that it looks at `.grad` of what it traces.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_every_class_passes_for_a_mixture_of_experts_and_the_table_says_so(world, tmp_path):
    path = world.write_recipe(tmp_path / "run", **MOE)
    code, out, err = pertoken("prove", path, "--json", tmp_path / "proof.json")
    assert (code, err) == (0, ""), out
    proof = json.loads((tmp_path / "proof.json").read_text())
    assert proof["holds"] is True
    # The objective has no balance loss per micro-batch, the recipe is not in float16, has no adapter and is for a CPU.
    others = ("balance loss per micro-batch", "float16 under its loss scale", "adapter, by the textbook", *ON_DEVICE)
    names = [name for name in NAMES if name not in others]
    assert [result["name"] for result in proof["results"]] == names
    for result in proof["results"]:
        assert result["verdict"] == "passed" or result["name"] == "compiled", result
        assert any(line.startswith(result["name"]) and result["verdict"] in line for line in out.splitlines()), out
    exact = [r for r in proof["results"] if r["dtype"] == "float64"]
    assert len(exact) == 21
    for result in exact:
        assert result["gradient_error"] <= 1e-10
    assert sum(result["worst"].startswith("model.") for result in exact) == 17  # the others are of no parameter
    assert "every class passed" in out
    assert 500 < proof["tokens"] < 700


def test_every_kind_of_class_passes_for_an_adapter_whose_b_are_not_zero(world, tmp_path):
    train(world.recipe(tmp_path / "base", train__max_steps=1))
    lora = {"model": {}, "init_from": str(tmp_path / "base"), "adapter__kind": "lora", "adapter__r": 4}
    names = ["adapter, by the textbook", "kernels", "resume in mid-epoch", "update, clipped", "changed modules"]
    names += ["transformers, padded", "FSDP2, 2 ranks", "update, FSDP2, 3 ranks"]
    proof = prove(world.recipe(tmp_path / "run", **lora), only=names)
    assert sorted(result.name for result in proof.results) == sorted(names)
    for result in proof.results:
        has_no_peft = result.name == "transformers, padded" and importlib.util.find_spec("peft") is None
        assert result.verdict == ("skipped" if has_no_peft else "passed"), result
        assert has_no_peft or ".lora_" in result.worst, result
    assert any("B are zero" in note for note in proof.notes)


def test_a_balance_loss_of_micro_batches_is_said_to_depend_on_the_split(world, tmp_path):
    path = world.write_recipe(tmp_path / "run", **MOE, model__aux_loss="micro_batch", model__aux_loss_coef=0.1)
    names = ["accumulation", "balance loss per micro-batch"]
    code, out, _ = pertoken("prove", path, *(x for name in names for x in ("--only", name)), "--json", tmp_path / "p")
    assert code == 0
    differing, accumulation = json.loads((tmp_path / "p").read_text())["results"]
    assert (differing["verdict"], accumulation["verdict"]) == ("differs", "passed")
    assert differing["gradient_error"] > 1e-3
    assert 'model.aux_loss="micro_batch"' in out
    assert "depends on the split" in out


def test_a_failure_names_its_class_and_exits_with_1(world, tmp_path, monkeypatch):
    mutants.mean_of_micro_batch_means(monkeypatch)
    path = world.write_recipe(tmp_path / "run")
    code, out, err = pertoken("prove", path, "--only", "accumulation", "--only", "one micro-batch")
    assert code == 1
    assert "FAILED" in out
    assert err.startswith("error: the promise does not hold")
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert " failed " in lines["accumulation"]
    assert " passed " in lines["one micro-batch"]  # with one, its mean is the step's


def test_a_crash_inside_of_a_class_is_its_failure(world, tmp_path, monkeypatch):
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr("pertoken.model.plain.attention", broken)
    monkeypatch.setattr("pertoken.prove.run.reference_gradient", lambda model, samples, **coefficients: zeros(model))
    proof = prove(world.recipe(tmp_path / "run"), only=["accumulation"])
    (result,) = proof.results
    assert result.verdict == "failed"
    assert result.note == "RuntimeError: no kernel for this shape"


def zeros(model: torch.nn.Module) -> Gradient:
    return Gradient(1.0, {name: torch.ones_like(p) for name, p in model.named_parameters()})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "acumulation"], "error: --only 'acumulation': no such class; there are every sample once an epoch"),
        (["--tokens", "10"], "error: --tokens 10: must be at least 40"),
        (["train.lr=1"], "error: train.lr: unknown key"),
    ],
)
def test_wrong_arguments_are_refused(world, tmp_path, arguments, message):
    code, _, err = pertoken("prove", world.write_recipe(tmp_path / "run"), *arguments)
    assert code == 2
    assert err.startswith(message)


def test_a_step_is_proved_on_its_device_too_where_that_is_another(world, tmp_path, monkeypatch):
    recipe = world.recipe(tmp_path / "run")
    with pytest.raises(RecipeError, match="about a device that is no CPU"):
        prove(recipe, only=ON_DEVICE)
    monkeypatch.setattr(run, "device_of", lambda recipe: torch.device("cpu"))
    found = {result.name: result for result in prove(recipe, only=ON_DEVICE).results}
    assert [found[name].verdict for name in ON_DEVICE] == ["passed"] * 3 + ["skipped"] * 2
    assert [found[name].dtype for name in ON_DEVICE] == ["float64", "float32"] + ["bfloat16"] * 3
    assert all(
        0 < result.gradient_error <= result.tolerance for name, result in found.items() if name not in ON_DEVICE[3:]
    )
    assert found[ON_DEVICE[2]].tolerance < 0.2


def test_pretraining_is_proved_too(tmp_path, text_file, bpe_folder):
    recipe = Recipe.parse(
        {
            "stage": "pretrain",
            "out_dir": str(tmp_path / "run"),
            "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "family": "llama"},
            "data": {"path": str(text_file), "tokenizer": str(bpe_folder), "max_seq_len": 32, "store": str(tmp_path)},
            "train": {"dtype": "float32", "batch_size": 4},
        }
    )
    only = [name for name in IN_ONE_PROCESS if name != "bfloat16, 20 steps"]
    proof = prove(recipe, only=only, tokens=100)
    assert [(r.name, r.note) for r in proof.results if r.verdict != "passed"] == [
        ("long documents", "no sample has more than 384 inputs")
    ]
    assert len(proof.results) == len(only) - 3  # of experts, of float16, of an adapter


ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "qwen2": {"family": "qwen2"},
    "llama3": {"family": "llama", "rope_theta": 50.0, "rope_scaling": ROPE},
    "olmo2": {"family": "olmo2"},
    "granite": {
        "family": "granite",
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 0.3,
    },
    "gemma3": {"family": "gemma3", "query_pre_attn_scalar": 5, "final_logit_softcapping": 0.7},
    "gemma2": {"family": "gemma2", "attn_logit_softcapping": 1.5, "sliding_window": 30, "final_logit_softcapping": 0.7},
    "phi3": {"family": "phi3", "partial_rotary_factor": 0.75, "head_dim": 16, "sliding_window": 30},
    "yarn": {
        "rope_theta": 50.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "shared expert": {"family": "qwen2", "use_moe": True, "num_experts_per_tok": 2, "aux_loss_coef": 0.1},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_with_a_feature_of_its_own_is_proved(world, tmp_path, name):
    recipe = world.recipe(tmp_path / "run", **{f"model__{key}": value for key, value in FAMILIES[name].items()})
    left_out = ["bfloat16, 20 steps"]
    if name not in ("qwen2", "llama3"):  # test_mutants.py has the heads of the others
        left_out += [name for name in IN_ONE_PROCESS if name.startswith("head in chunks")]
    only = [*(name for name in IN_ONE_PROCESS if name not in left_out), "FSDP2, 2 ranks"]
    proof = prove(recipe, only=only, tokens=300)
    assert [(r.name, r.note) for r in proof.results if r.verdict == "failed"] == []
    by_name = {r.name: r for r in proof.results}
    for needed in ("kernels", "changed modules", "transformers, padded", "FSDP2, 2 ranks"):
        assert by_name[needed].verdict == "passed", (needed, by_name)


@pytest.mark.parametrize("mutant", [None, "end_of_document_lost"])
def test_a_text_that_is_read_in_blocks_is_compared_with_its_samples(
    tmp_path, text_file, bpe_folder, monkeypatch, mutant
):
    monkeypatch.setattr("pertoken.data.files.limits.LONG_BYTES", 0)
    monkeypatch.setattr("pertoken.data.samples._CHUNK_CHARS", 1)
    monkeypatch.setattr("pertoken.data.files.long_text._BLOCK_BYTES", 7)
    if mutant:
        mutants.plant(mutant, monkeypatch)
    recipe = Recipe.parse(
        {
            "stage": "pretrain",
            "out_dir": str(tmp_path / "run"),
            "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "family": "llama"},
            "data": {
                "path": str(text_file),
                "tokenizer": str(bpe_folder),
                "max_seq_len": 32,
                "store": str(tmp_path),
                "eval_split": "tail",
                "eval_fraction": 0.2,
            },
            "train": {"dtype": "float32", "batch_size": 4},
        }
    )
    proof = prove(recipe, only=["rows, token by token", "who is supervised"], tokens=100)
    verdicts = [result.verdict for result in proof.results]
    assert verdicts == (["failed", "passed"] if mutant else ["passed", "passed"]), proof.results


def test_a_family_of_transformers_own_is_proved_too(world, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=1024)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    recipe = world.recipe(tmp_path / "run", init_from=str(tmp_path / "gpt2"), model={})
    names = ["accumulation", "one micro-batch", "float32", "resume in mid-epoch", "transformers, padded"]
    names += ["update, clipped", "norm, in the run's dtype", "evaluation", "head in chunks, kernels", "long documents"]
    ranks = ["DDP, 2 ranks", "FSDP2, 3 ranks", "update, DDP, 2 ranks", "update, FSDP2, 3 ranks"]
    proof = prove(recipe, only=[*names, "kernels", "compiled", *ranks])
    verdicts = {r.name: (r.verdict, r.note) for r in proof.results}
    assert verdicts.pop("kernels")[0] == verdicts.pop("compiled")[0] == "skipped"
    assert [name for name, (verdict, _) in verdicts.items() if verdict != "passed"] == [], verdicts


def test_the_head_has_several_chunks_and_long_documents_several_blocks():
    for vocab_size in (26, 320, 6400, 151_936):
        rows = paths._CHUNKS * max(paths._ROWS_OF_A_CHUNK, paths._LOGITS_OF_A_CHUNK / vocab_size)
        plain = max(cross_entropy._MIN_CHUNK_ROWS, cross_entropy._CHUNK_BYTES // (4 * vocab_size))
        by_kernels = cross_entropy._chunk_rows(vocab_size, paths._COLUMNS, torch.float32)
        assert min(rows / plain, rows / by_kernels) > 2.2
    assert LONG == cpu_attention._ONE_BLOCK


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warm_up", [{"warmup_steps": 0}, {"warmup_steps": 7}, {"warmup_ratio": 0.07}], ids=str)
@pytest.mark.parametrize("min_lr_ratio", [0.25, 0.0])
def test_the_two_formulas_of_every_schedule_agree(world, tmp_path, schedule, warm_up, min_lr_ratio):
    keys = {"train__schedule": schedule, "train__max_steps": None, "train__epochs": 1.5, "train__batch_size": 2}
    keys |= {"train__min_lr_ratio": min_lr_ratio, **{f"train__{key}": value for key, value in warm_up.items()}}
    proof = prove(world.recipe(tmp_path / "run", **keys), only=["learning rate"])
    assert [r.verdict for r in proof.results] == ["passed"], proof.results


def test_a_run_whose_last_learning_rate_is_zero_passes(world, tmp_path):
    keys = {"train__schedule": "cosine", "train__min_lr_ratio": 0.0, "train__warmup_steps": 0, "train__max_steps": 2}
    proof = prove(world.recipe(tmp_path / "run", **keys), only=["learning rate", "update, not clipped"])
    assert [r.verdict for r in proof.results] == ["passed"] * 2, proof.results


def test_the_norm_is_clipped_where_the_two_samples_have_a_far_smaller_one_than_all(world, tmp_path, monkeypatch):
    def with_large_others(*arguments: Any) -> Case:
        case = of(*arguments)
        gradients = {name: 30 * gradient for name, gradient in case.reference.gradients.items()}
        return replace(case, reference=Gradient(case.reference.loss, gradients))

    of = run._case
    monkeypatch.setattr(run, "_case", with_large_others)
    mutants.plant("clipping_twice", monkeypatch)
    proof = prove(world.recipe(tmp_path / "run"), only=["norm, in the run's dtype"])
    assert [r.verdict for r in proof.results] == ["failed"], proof.results
    assert proof.results[0].gradient_error > 0.1


def test_an_optimizer_without_a_textbook_is_not_said_to_be_proved(world, tmp_path, monkeypatch):
    monkeypatch.delitem(plain_update._ROLES, "adamw")
    proof = prove(world.recipe(tmp_path / "run"), only=["update, clipped", "update, DDP, 2 ranks", "learning rate"])
    verdicts = {result.name: (result.verdict, result.note) for result in proof.results}
    said = ("skipped", "no plain update of adamw is known")
    assert verdicts["update, clipped"] == verdicts["update, DDP, 2 ranks"] == said
    assert verdicts["learning rate"][0] == "passed"


def test_an_update_is_measured_by_what_rounding_of_its_gradient_can_do():
    train = TrainConfig(learning_rate=1e-3, weight_decay=0.0)
    gradient = torch.tensor([1.0, 1e-12], dtype=torch.float64)
    weights = {"w": torch.zeros(2, dtype=torch.float64)}
    changes = [
        PlainOptimizer(train, {"w": "decays"}).changes(weights, {"w": one}, lr=1e-3, factor=1.0)["w"]
        for one in (gradient, gradient + torch.tensor([0.0, 1e-16]), gradient * torch.tensor([1.0, 1.5]))
    ]
    assert changes[0].change[1] / changes[0].change[0] == pytest.approx(1e-4, rel=1e-3)
    assert abs(changes[1].change - changes[0].change).max() / abs(changes[0].change).max() > 1e-10
    assert changes[0].error_of(changes[1].change) < 1e-10  # rounding, though the entry moved
    assert changes[0].error_of(changes[0].change * (1 + 1e-9)) > 1e-10  # where the gradient is not near zero
    assert changes[0].error_of(changes[0].change * math.nan) == math.inf


def test_the_samples_are_the_first_steps_and_have_one_that_nobody_supervises(world, tmp_path):
    store, _ = prepare(world.recipe(tmp_path / "run"))
    chosen = choose(store, tokens=600, batch_size=16, seed=42)
    from pertoken.data.batch.order import step_at

    first = step_at(1, num_samples=len(store), batch_size=16, seed=42).sample_ids.tolist()
    assert set(chosen.ids) <= set(first)
    assert len(chosen.ids) >= 5
    assert chosen.samples.num_tokens.tolist()[-1] == 0
    assert all(n > 0 for n in chosen.samples.num_tokens[:-1])
    assert len(set(chosen.samples.num_tokens.tolist())) > 3  # skewed


def test_errors_are_measured_by_parameter():
    reference = Gradient(
        2.0, {"big": torch.tensor([100.0, 1.0]), "small": torch.tensor([1e-6]), "none": torch.zeros(1)}
    )
    dead = Gradient(2.0, {"big": torch.tensor([100.0, 1.0]), "small": torch.zeros(1), "none": torch.zeros(1)})
    found = compare(dead, reference)
    assert (found.gradient_error, found.worst) == (1.0, "small")
    assert found.norm_ratio == pytest.approx(1.0)
    missing = Gradient(2.0, {"big": reference.gradients["big"], "none": torch.zeros(1)})
    assert compare(missing, reference).gradient_error == math.inf
    grown = Gradient(2.0, reference.gradients | {"none": torch.tensor([1.0])})
    assert compare(grown, reference).gradient_error == pytest.approx(0.01)
    broken = Gradient(math.nan, reference.gradients | {"small": torch.tensor([math.nan])})
    assert Result.judge("x", "float64", 1e-10, compare(broken, reference)).verdict == "failed"


def test_a_loss_or_norm_alone_that_is_off_fails():
    gradients = {"w": torch.tensor([1.0, 2.0])}
    reference = Gradient(2.0, gradients)
    assert Result.judge("x", "float64", 1e-10, compare(Gradient(2.1, gradients), reference)).verdict == "failed"
    assert Result.judge("x", "float64", 1e-10, compare(Gradient(2.0, gradients), reference)).verdict == "passed"


@pytest.mark.parametrize("name", ["float16 under its loss scale", "balance loss per micro-batch"])
def test_to_run_no_class_at_all_is_no_proof(world, tmp_path, name):
    with pytest.raises(RecipeError, match=f"only='{name}': not of this recipe"):
        prove(world.recipe(tmp_path / "run"), only=[name])


def test_unknown_classes_raise(world, tmp_path):
    with pytest.raises(RecipeError, match="no such class"):
        prove(world.recipe(tmp_path / "run"), only=["nonsense"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(("recipe", "limit_s"), [("gsm8k-30m", 180), ("gsm8k-moe", 300)])  # 30M and 91M parameters
def test_the_recipes_pass(shared_data, tmp_path, monkeypatch, recipe, limit_s):
    monkeypatch.chdir(ROOT)
    proof = prove(Recipe.load(ROOT / "recipes" / f"{recipe}.toml"))
    assert [r for r in proof.results if r.verdict != "passed"] == []
    assert proof.seconds < limit_s


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_real_model_passes(shared_data, smollm2, tmp_path):
    data = {"path": str(shared_data / "sft" / "gsm8k" / "train.jsonl"), "format": "prompt_completion"}
    recipe = Recipe.parse(
        {
            "stage": "sft",
            "out_dir": str(tmp_path / "run"),
            "init_from": str(smollm2),
            "data": data | {"prompt_key": "question", "completion_key": "answer", "max_seq_len": 512},
        }
    )
    proof = prove(recipe)
    assert [r for r in proof.results if r.verdict != "passed"] == []
