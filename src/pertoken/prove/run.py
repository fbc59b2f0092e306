"""`prove`: everything together."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from pertoken.data.tokens.tokenizer import as_transformers
from pertoken.errors import RecipeError
from pertoken.model.protocol import LanguageModel
from pertoken.prove.adapter import by_the_textbook, fill_b
from pertoken.prove.case import Case
from pertoken.prove.checks import every_sample_once, who_is_supervised
from pertoken.prove.classes import CLASSES, split_of_balance
from pertoken.prove.clipping import CLIPPING_CLASSES, float16
from pertoken.prove.device import DEVICE_CLASSES, device_of
from pertoken.prove.drift import STEPS, bfloat16
from pertoken.prove.evaluation import evaluation
from pertoken.prove.modules import changed_modules
from pertoken.prove.other import transformers_padded
from pertoken.prove.paths import PATH_CLASSES
from pertoken.prove.plain_update import total_steps_of
from pertoken.prove.ranks import RANK_CLASSES, run_ranks
from pertoken.prove.reference import reference_gradient
from pertoken.prove.report import Proof, Result, largest_error
from pertoken.prove.rows import token_by_token
from pertoken.prove.samples import Chosen, choose, choose_long
from pertoken.prove.update import UPDATE_CLASSES
from pertoken.recipe.schema import Recipe
from pertoken.runs.data import RunData, load_data
from pertoken.runs.model import build_model
from pertoken.tracking.listener import Listener
from pertoken.training.parallel import World
from pertoken.training.precision import Precision

__all__ = ["NAMES", "prove"]

_EPOCH, _ROWS, _SUPERVISED = "every sample once an epoch", "rows, token by token", "who is supervised"
_CHANGED, _ADAPTER = "changed modules", "adapter, by the textbook"
_TRANSFORMERS, _BFLOAT16 = "transformers, padded", f"bfloat16, {STEPS} steps"
_FLOAT16 = "float16 under its loss scale"
_BALANCE = "balance loss per micro-batch"
_OF_CASE = {**CLASSES, **CLIPPING_CLASSES, **UPDATE_CLASSES, **PATH_CLASSES, "evaluation": evaluation}
_OF_DATA, _OF_STEPS = (_EPOCH, _ROWS, _SUPERVISED), (_FLOAT16, _BFLOAT16)
NAMES = (
    *(*_OF_DATA, *_OF_CASE, _CHANGED, _ADAPTER, *_OF_STEPS, _TRANSFORMERS),
    *(*RANK_CLASSES, *DEVICE_CLASSES, _BALANCE),
)
_LEAST_TOKENS = 40


def prove(
    recipe: Recipe,
    *,
    tokens: int = 600,
    only: Sequence[str] = NAMES,
    on_result: Callable[[Result], None] = lambda result: None,
    listener: Listener | None = None,
) -> Proof:
    """Compute the gradient of real samples of `recipe` in every way that training may, and compare.

    About `tokens` inputs of the first step's samples are used, with the weights that the recipe starts from: on the
    CPU, and in a few classes on the device that the recipe trains on. `only` names classes of NAMES; `on_result` is
    told each result as it comes. A class that raises has failed.
    Raises what training itself would raise before its first step.
    """
    if unknown := [name for name in only if name not in NAMES]:
        raise RecipeError(f"only={unknown[0]!r}: no such class; there are {', '.join(NAMES)}")
    if tokens < _LEAST_TOKENS:
        raise RecipeError(f"tokens={tokens}: must be at least {_LEAST_TOKENS}")
    started = time.perf_counter()
    data = load_data(recipe, listener or Listener(), World())
    model = build_model(recipe, data, None, Precision("float32", torch.device("cpu")))
    notes = [note] if (note := fill_b(model, recipe.train.seed)) is not None else []
    chosen, *later = (
        choose(data.train, tokens=tokens, batch_size=recipe.train.batch_size, seed=recipe.train.seed, step=step)
        for step in range(1, STEPS + 2)
    )
    samples = [chosen.samples[i] for i in range(len(chosen.samples))]
    results: list[Result] = []

    def run(name: str, work: Callable[[], Result]) -> None:
        if name not in only:
            return
        try:
            add(work())
        except Exception as error:  # whatever a mistake leads to, it is this class that has it
            add(_raised(name, error))

    def add(result: Result) -> None:
        results.append(result)
        on_result(result)

    run(_EPOCH, lambda: every_sample_once(_EPOCH, data.train, recipe))
    for name, check in ((_ROWS, token_by_token), (_SUPERVISED, who_is_supervised)):
        run(
            name,
            lambda check=check, name=name: check(name, data.train, chosen, recipe, as_transformers(data.tokenizer)),  # type: ignore[misc]
        )
    balance_loss = model.facts.balance_loss
    per_micro_batch = balance_loss is not None and balance_loss.kind == "micro_batch"
    if balance_loss is not None and per_micro_batch:
        run(_BALANCE, lambda: split_of_balance(_BALANCE, copy.deepcopy(model).double(), chosen))
        # What depends on the split by its definition is left out of what must not.
        model.set_balance_loss(replace(balance_loss, kind="none"))
    case = _case(recipe, model, data, chosen, later)
    for name, of_class in _OF_CASE.items():
        run(name, lambda of_class=of_class, name=name: of_class(name, case))  # type: ignore[misc]
    run(_CHANGED, lambda: changed_modules(_CHANGED, case))
    if model.adapter is not None:
        run(_ADAPTER, lambda: by_the_textbook(_ADAPTER, case))
    if recipe.train.dtype == "float16":
        run(_FLOAT16, lambda: float16(_FLOAT16, case))
    run(_BFLOAT16, lambda: bfloat16(_BFLOAT16, case))
    run(_TRANSFORMERS, lambda: transformers_padded(_TRANSFORMERS, case))
    if ranks := [name for name in RANK_CLASSES if name in only]:
        try:
            of_ranks = run_ranks(ranks, case)
        except Exception as error:
            of_ranks = [_raised(name, error) for name in ranks]
        for result in of_ranks:
            add(result)
    if (device := device_of(recipe)) is not None:
        for name, on_device in DEVICE_CLASSES.items():
            run(name, lambda on_device=on_device, name=name: on_device(name, case, device))  # type: ignore[misc]
    if only and not results:  # which is no proof
        raise RecipeError(
            f'only={only[0]!r}: not of this recipe; {_FLOAT16!r} is about train.dtype="float16", {_BALANCE!r} about '
            f'model.aux_loss="micro_batch", {_ADAPTER!r} about adapter.kind="lora", '
            f"{next(iter(DEVICE_CLASSES))!r} about a device that is no CPU"
        )
    return Proof(
        results=tuple(results),
        model=f"{model.facts.family}, {model.num_parameters:,} parameters",
        samples=chosen.sources,
        cut=chosen.cut,
        tokens=sum(map(len, samples)),
        supervised=int(chosen.samples.num_tokens.sum()),
        notes=(*notes, *((_PER_MICRO_BATCH,) if per_micro_batch else ())),
        seconds=time.perf_counter() - started,
    )


def _raised(name: str, error: Exception) -> Result:
    return Result(name, "", "failed", note=f"{type(error).__name__}: {error}")


_PER_MICRO_BATCH = (
    'model.aux_loss="micro_batch": this balance loss is defined over the tokens of a micro-batch, so the objective '
    'depends on the split; it is left out of the comparisons. "sequence" is the same however the step is split.'
)


def _case(recipe: Recipe, model: LanguageModel, data: RunData, chosen: Chosen, later: Sequence[Chosen]) -> Case:
    """The reference in float64, and how far the same plain computation is off in float32."""
    samples = [chosen.samples[i] for i in range(len(chosen.samples))]
    balance_loss = model.facts.balance_loss
    coefficient = balance_loss.coefficient if balance_loss is not None and balance_loss.kind == "sequence" else 0.0
    coefficients = {"aux_loss_coef": coefficient, "z_loss_coef": recipe.train.z_loss_coef}
    in_float32 = reference_gradient(model, samples, **coefficients)
    model = model.double()
    reference = reference_gradient(model, samples, **coefficients)
    return Case(
        model=model,
        chosen=chosen,
        later=tuple(other.samples for other in later),
        long=choose_long(data.train),
        aux_loss_coef=coefficient,
        recipe=recipe,
        total_steps=total_steps_of(recipe.train, len(data.train)),
        tokenizer=data.tokenizer,
        reference=reference,
        float32_error=largest_error(in_float32, reference),
    )
