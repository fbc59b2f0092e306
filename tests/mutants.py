"""Known mistakes, each planted by patching a production function. `prove` must find every one of them.

A mutant is a function that takes a `pytest.MonkeyPatch`, so that ranks, which are processes of their own, can plant it
as well: `python mutants.py NAME FOLDER RANK`. Those of `update_mutants.py` are found here too.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import update_mutants
from torch import nn

import pertoken.data.batch.order
import pertoken.data.batch.share
import pertoken.data.chat.render
import pertoken.data.samples
import pertoken.engines.cpu.blocks
import pertoken.engines.cpu.engine
import pertoken.engines.cpu.mlp
import pertoken.engines.cpu.runner
import pertoken.folders.adapters
import pertoken.model.attention
import pertoken.model.plain
import pertoken.objective.cross_entropy
import pertoken.prove.case
import pertoken.prove.checks
import pertoken.prove.classes
import pertoken.prove.ranks
from pertoken.data.batch.pack import MicroBatch, Sample
from pertoken.data.batch.share import Share
from pertoken.data.chat.render import Rendered
from pertoken.data.tokens.encode import TextWithSpans
from pertoken.engines.cpu.runner import CpuBatch
from pertoken.kernels.ops import Kernels
from pertoken.model.execution import Casts, Execution
from pertoken.model.lora import Adapter, LoraLinear
from pertoken.objective.choose import objective_of
from pertoken.objective.logit_map import LogitMap
from pertoken.objective.row_terms import RowFactors
from pertoken.objective.terms import LossOutput, Term
from pertoken.recipe.train import TrainConfig
from pertoken.training.step import TrainState

Patch = pytest.MonkeyPatch


def _counting_micro_batches(patch: Patch) -> Callable[[], int]:
    """How many micro-batches the step under way has."""
    train_step, count = pertoken.prove.case.train_step, [1]

    def counted(state: TrainState, share: Share, **settings: Any) -> Any:
        count[0] = len(share.micro_batches)
        return train_step(state, share, **settings)

    patch.setattr(pertoken.prove.case, "train_step", counted)
    return lambda: count[0]


def mean_of_micro_batch_means(patch: Patch) -> None:
    count = _counting_micro_batches(patch)

    def objective(self: LossOutput, denominators: dict[str, float]) -> torch.Tensor:
        return self.loss_sum / self.num_tokens.clamp(min=1) / count()

    patch.setattr(LossOutput, "objective", objective)


def world_size_missing(patch: Patch) -> None:
    backward = TrainState.backward
    patch.setattr(TrainState, "backward", lambda self, objective: backward(self, objective / self.world.size))


def world_size_twice(patch: Patch) -> None:
    backward = TrainState.backward
    patch.setattr(TrainState, "backward", lambda self, objective: backward(self, objective * self.world.size))


def labels_not_shifted(patch: Patch) -> None:
    patch.setattr(Sample, "labels", property(lambda self: self.tokens[:-1]))


def labels_shifted_twice(patch: Patch) -> None:
    patch.setattr(Sample, "labels", property(lambda self: np.roll(self.tokens[1:], -1)))


def _padded(samples: Any) -> list[Sample]:
    longest = max((len(sample) for sample in samples), default=0)
    return [
        Sample(
            np.pad(s.tokens, (0, longest - len(s))), np.pad(s.loss_mask, (0, longest - len(s)), constant_values=True)
        )
        for s in samples
    ]


def padding_supervised(patch: Patch) -> None:
    collate = pertoken.data.batch.share.collate
    patch.setattr(pertoken.data.batch.share, "collate", lambda samples: collate(_padded(samples)))


def padding_in_the_count(patch: Patch) -> None:
    """The mean is over padded rows: the sums are right, N is not."""
    objective = LossOutput.objective

    def padded(self: LossOutput, denominators: dict[str, float]) -> torch.Tensor:
        return objective(self, denominators | {"supervised": 1.3 * denominators["supervised"]})

    patch.setattr(LossOutput, "objective", padded)


def tail_of_the_epoch_dropped(patch: Patch) -> None:
    for module in (pertoken.data.batch.order, pertoken.prove.checks):
        patch.setattr(module, "steps_per_epoch", lambda num_samples, batch_size: num_samples // batch_size)


def tail_under_scaled(patch: Patch) -> None:
    """Divided by the accumulation that a whole step has, however few micro-batches the last one has."""
    count = _counting_micro_batches(patch)
    backward = TrainState.backward
    patch.setattr(TrainState, "backward", lambda self, objective: backward(self, objective * min(1.0, count() / 2)))


def _with_another_term(patch: Patch, name: str, change: Callable[[Term], Term]) -> None:
    """`change` one term before the objective is formed."""
    objective = LossOutput.objective

    def changed(self: LossOutput, denominators: dict[str, float]) -> torch.Tensor:
        terms = self.more_terms | {name: change(self.more_terms[name])}
        return objective(dataclasses.replace(self, more_terms=terms), denominators)

    patch.setattr(LossOutput, "objective", changed)


def balance_loss_times_accumulation(patch: Patch) -> None:
    count = _counting_micro_batches(patch)

    _with_another_term(patch, "aux_loss", lambda term: dataclasses.replace(term, sum=term.sum * count()))


def balance_loss_by_supervised_tokens(patch: Patch) -> None:
    _with_another_term(patch, "aux_loss", lambda term: dataclasses.replace(term, denominator="supervised"))


def router_dead(patch: Patch) -> None:
    """No gradient of the balance loss reaches the routers; they are a hundredth of the parameters."""
    _with_another_term(patch, "aux_loss", lambda term: dataclasses.replace(term, coefficient=0.0))


def _with_other_factors(patch: Patch, change: Callable[[RowFactors], RowFactors]) -> None:
    """`change` what the gradient of the head's further terms is made of, in every implementation but the plain one."""
    row_factors = pertoken.objective.cross_entropy.row_factors

    def changed(*arguments: Any) -> Any:
        values, factors = row_factors(*arguments)
        return values, factors and change(factors)

    patch.setattr(pertoken.objective.cross_entropy, "row_factors", changed)


def z_loss_without_a_gradient(patch: Patch) -> None:
    _with_other_factors(patch, lambda f: RowFactors(f.at_label, f.at_label))


def z_loss_of_the_label_too(patch: Patch) -> None:
    """Its gradient is made with softmax - one hot, as the cross entropy's is."""
    _with_other_factors(patch, lambda f: RowFactors(f.on_softmax, f.on_softmax))


def z_loss_as_a_mean_of_micro_batch_means(patch: Patch) -> None:
    """Divided by each micro-batch's own count, and by how many there are."""
    count, objective = _counting_micro_batches(patch), LossOutput.objective

    def by_its_own(self: LossOutput, denominators: dict[str, float]) -> torch.Tensor:
        z_loss = self.more_terms["z_loss"]
        mean = z_loss.coefficient * z_loss.sum / self.num_tokens.clamp(min=1) / count()
        return objective(dataclasses.replace(self, more_terms={}), denominators) + mean

    patch.setattr(LossOutput, "objective", by_its_own)


def z_loss_times_accumulation(patch: Patch) -> None:
    count, row_factors = _counting_micro_batches(patch), pertoken.objective.cross_entropy.row_factors

    def more(terms: Any, *arguments: Any) -> Any:
        return row_factors([dataclasses.replace(t, coefficient=t.coefficient * count()) for t in terms], *arguments)

    patch.setattr(pertoken.objective.cross_entropy, "row_factors", more)


def z_loss_of_every_token(patch: Patch) -> None:
    """Of those too that nobody supervises, where the head sees them. In the plain loss."""
    plain = pertoken.objective.cross_entropy._plain

    def without_the_mask(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, terms: Any) -> LossOutput:
        of_all = plain(logits, torch.zeros_like(labels), torch.ones_like(mask), terms)
        return dataclasses.replace(plain(logits, labels, mask, terms), more_terms=of_all.more_terms)

    patch.setattr(pertoken.objective.cross_entropy, "_plain", without_the_mask)


def z_loss_lost_by_the_kernels(patch: Patch) -> None:
    """The kernels' gradient has the factor of the label alone."""
    gradient = Kernels.cross_entropy_gradient

    def of_the_label(self: Kernels, logits: Any, labels: Any, statistics: Any, on_softmax: Any, at_label: Any) -> None:
        gradient(self, logits, labels, statistics, at_label, at_label)

    patch.setattr(Kernels, "cross_entropy_gradient", of_the_label)


def z_loss_in_the_evaluation(patch: Patch) -> None:
    forward = pertoken.model.decoder.CausalLM.forward
    terms = objective_of(TrainConfig(z_loss_coef=0.1))

    def with_it(self: Any, *arguments: Any, **settings: Any) -> LossOutput:
        out = forward(self, *arguments, **{"objective": terms, **settings})
        more = sum(term.coefficient * term.sum for term in out.more_terms.values())
        return out if "objective" in settings else dataclasses.replace(out, loss_sum=out.loss_sum + more)

    patch.setattr(pertoken.model.decoder.CausalLM, "forward", with_it)


def soft_cap_without_its_slope(patch: Patch) -> None:
    """In the chunked head."""
    cap = LogitMap.cap_

    def flat(self: LogitMap, logits: torch.Tensor) -> None:
        cap(self, logits)

    patch.setattr(LogitMap, "cap_", flat)


def soft_cap_without_its_slope_by_the_kernels(patch: Patch) -> None:
    patch.setattr(Kernels, "soft_cap_gradient", lambda self, gradient, uncapped, cap: None)


def logits_not_scaled(patch: Patch) -> None:
    """In every head but the plain one."""
    patch.setattr(LogitMap, "scale_hidden", lambda self, hidden: hidden)


def residual_multiplier_without_a_gradient(patch: Patch) -> None:
    """By the kernels."""
    usual = pertoken.engines.cpu.mlp.d_add_update

    def unmultiplied(batch: CpuBatch, *arguments: Any) -> Any:
        return usual(dataclasses.replace(batch, residual_multiplier=1.0), *arguments)

    patch.setattr(pertoken.engines.cpu.mlp, "d_add_update", unmultiplied)


def clipping_before_unscaling(patch: Patch) -> None:
    clip_and_step = TrainState.clip_and_step

    def wrong(self: TrainState, lr: float, max_norm: float, *arguments: Any) -> Any:
        if max_norm:
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], max_norm)
        return clip_and_step(self, lr, 0.0, *arguments)

    patch.setattr(TrainState, "clip_and_step", wrong)


def a_sample_twice_in_a_step(patch: Patch) -> None:
    pack = pertoken.data.batch.share.pack_micro_batches

    def twice(*args: Any, **settings: Any) -> Any:
        cut = pack(*args, **settings)
        cut[0][0] = [*cut[0][0], cut[0][0][0]]
        return cut

    patch.setattr(pertoken.data.batch.share, "pack_micro_batches", twice)


def a_sample_twice_in_an_epoch(patch: Patch) -> None:
    permute = pertoken.data.batch.order.permute
    patch.setattr(
        pertoken.data.batch.order, "permute", lambda positions, **key: permute(np.maximum(positions, 1), **key)
    )


def attention_across_documents(patch: Patch) -> None:
    of = pertoken.model.attention.AttentionLayout.of

    def one_document(lengths: Any, device: torch.device, **_: Any) -> Any:
        return of([sum(lengths)] if lengths else [], device)

    patch.setattr(pertoken.model.plain.AttentionLayout, "of", one_document)


def prompt_supervised(patch: Patch) -> None:
    rendered = pertoken.data.samples.rendered_chat

    def everything(*args: Any) -> Rendered:
        texts = [sample.text for sample in rendered(*args).samples]
        return Rendered([TextWithSpans(text, [(0, len(text))]) for text in texts])

    patch.setattr(pertoken.data.samples, "rendered_chat", everything)


def end_of_turn_unsupervised(patch: Patch) -> None:
    rendered = pertoken.data.samples.rendered_chat

    def shorter(chat: Any, template: Any) -> Rendered:
        def cut(sample: TextWithSpans) -> TextWithSpans:
            return TextWithSpans(sample.text, [(start, end - len(template.end_of_turn)) for start, end in sample.spans])

        return Rendered([cut(sample) for sample in rendered(chat, template).samples])

    patch.setattr(pertoken.data.samples, "rendered_chat", shorter)


def _relabeled(patch: Patch, mask_too: bool) -> None:
    collate = pertoken.data.batch.share.collate

    def with_ignore_index(samples: Any) -> MicroBatch:
        micro_batch = collate(samples)
        labels = micro_batch.labels.masked_fill(~micro_batch.loss_mask, -100)
        mask = torch.ones_like(micro_batch.loss_mask) if mask_too else micro_batch.loss_mask
        return dataclasses.replace(micro_batch, labels=labels, loss_mask=mask)

    patch.setattr(pertoken.data.batch.share, "collate", with_ignore_index)


def ignore_index_as_a_label(patch: Patch) -> None:
    _relabeled(patch, mask_too=False)


def ignore_index_learned(patch: Patch) -> None:
    _relabeled(patch, mask_too=True)


def casts_outlive_their_step(patch: Patch) -> None:
    casts = Casts()

    @contextmanager
    def for_ever(self: Execution) -> Iterator[Execution]:
        yield dataclasses.replace(self, casts=casts)

    patch.setattr(Execution, "keeping_casts", for_ever)


def kernels_see_one_ahead(patch: Patch) -> None:
    forward = Kernels.softmax_forward

    def ahead(self: Kernels, scores: torch.Tensor, log_z: torch.Tensor, limits: torch.Tensor, scale: float) -> None:
        forward(self, scores, log_z, (limits + (limits > 0)).clamp(max=scores.shape[-1]), scale)

    patch.setattr(Kernels, "softmax_forward", ahead)


def rows_beside_the_asked_ones(patch: Patch) -> None:
    """The last block computes the row before the last supervised one in its place."""
    usual = pertoken.engines.cpu.runner.CpuBatch.with_output_rows

    def beside(self: Any, output_rows: torch.Tensor) -> Any:
        return usual(self, output_rows - (output_rows == output_rows.max()).long())

    patch.setattr(pertoken.engines.cpu.runner.CpuBatch, "with_output_rows", beside)


def head_gradient_lost(patch: Patch) -> None:
    """Of a tied embedding."""
    patch.setattr(
        pertoken.objective.cross_entropy.TiedGradient, "of_head", property(lambda self: None, lambda self, value: None)
    )


def _blind_to(patch: Patch, words: str) -> None:
    """The kernels run over modules of which `unsupported` would have said `words`."""
    check = pertoken.engines.cpu.engine.unsupported

    def blind(model: object) -> str | None:
        why = check(model)
        return None if why is not None and words in why else why

    patch.setattr(pertoken.engines.cpu.engine, "unsupported", blind)


def replaced_projection_not_seen(patch: Patch) -> None:
    _blind_to(patch, "q_proj is a")


def bias_not_seen(patch: Patch) -> None:
    _blind_to(patch, "q_proj has a bias")


def hook_not_seen(patch: Patch) -> None:
    _blind_to(patch, "v_proj has a forward hook")


def frozen_matrix_learns(patch: Patch) -> None:
    """The kernels ask for every gradient, whatever the parameter says."""
    run = pertoken.engines.cpu.engine._CpuPass.run

    def all_learn(self: Any, *args: Any, **settings: Any) -> Any:
        self._model.requires_grad_(True)
        return run(self, *args, **settings)

    patch.setattr(pertoken.engines.cpu.engine._CpuPass, "run", all_learn)


def adapter_scale_lost_by_the_kernels(patch: Patch) -> None:
    """W + B A is what their blocks read."""

    def unscaled(self: LoraLinear) -> torch.Tensor:
        return (self.weight + self.lora_B.weight @ self.lora_A.weight).detach()

    patch.setattr(LoraLinear, "merged_weight", unscaled)


def adapter_gradients_without_the_last_row(patch: Patch) -> None:
    """The gradients of A and B leave out the last row."""
    d_factors = pertoken.engines.cpu.blocks.d_factors

    def shorter(x: torch.Tensor, d_rows: Any, *more: Any) -> Any:
        return d_factors(x[:-1], [d[:-1] for d in d_rows], *more)

    patch.setattr(pertoken.engines.cpu.blocks, "d_factors", shorter)


def adapter_scaled_by_alpha(patch: Patch) -> None:
    """By every engine alike, so that only another formula can tell."""
    patch.setattr(Adapter, "scale", property(lambda self: self.alpha))


def frozen_weights_in_the_norm(patch: Patch) -> None:
    """Everything keeps its gradient, whether it is trained or not."""
    add_lora = pertoken.folders.adapters.add_lora

    def all_learn(model: nn.Module, *more: Any) -> None:
        add_lora(model, *more)
        model.requires_grad_(True)

    patch.setattr(pertoken.folders.adapters, "add_lora", all_learn)


def optimizer_state_lost(patch: Patch) -> None:
    patch.setattr(pertoken.prove.classes, "load_optimizer", lambda checkpoint, model, optimizer: None)


def plant(name: str, patch: Patch) -> None:
    """The mistake of this name."""
    mistake = globals().get(name) or getattr(update_mutants, name)
    mistake(patch)


def main(name: str, folder: Path, rank: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        plant(name, patch)
        pertoken.prove.ranks.rank_main(folder, rank)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
