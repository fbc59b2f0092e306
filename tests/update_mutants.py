"""Known mistakes outside of a step's gradient (rows, order, schedule, norm, clipping, update, evaluation), and in code
that a few short samples do not reach. Planted like those of `mutants.py`, which looks here too.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import pertoken.checkpoints.read
import pertoken.data.batch.order
import pertoken.data.samples
import pertoken.engines.cpu.attention
import pertoken.engines.cpu.blocks
import pertoken.objective.cross_entropy
import pertoken.prove.evaluation
import pertoken.prove.update
import pertoken.runs.computation
import pertoken.training.optimizers.adamw
import pertoken.training.optimizers.muon
import pertoken.training.optimizers.optimizer
import pertoken.training.schedule
import pertoken.training.step
from pertoken.data.batch.pack import collate, pack_micro_batches
from pertoken.kernels.ops import Kernels
from pertoken.training.evaluate import Evaluation
from pertoken.training.parallel import World
from pertoken.training.step import TrainState

Patch = pytest.MonkeyPatch


def _rewrite(patch: Patch, of: ModuleType, name: str, old: str, new: str, *, seen_by: Sequence[Any] = ()) -> None:
    """Function `name` of a module with `old` replaced in its source, there and in the modules that import it."""
    source = textwrap.dedent(inspect.getsource(getattr(of, name)))
    assert source.count(old) == 1, (name, old)
    scope = dict(vars(of))
    exec(source.replace(old, new), scope)
    for module in (of, *seen_by):
        patch.setattr(module, name, scope[name])


# Rows and their order.


def label_lost_at_each_cut(patch: Patch) -> None:
    old, new = "max_seq_len, max_seq_len)\n", "max_seq_len, max_seq_len + 1)\n"
    _rewrite(patch, pertoken.data.samples, "_text_samples", old, new)


def end_of_document_lost(patch: Patch) -> None:
    old, new = "whole, 0, len(whole.tokens) - 1)", "whole, 0, len(whole.tokens) - 2)"
    _rewrite(patch, pertoken.data.samples, "_text_samples", old, new)


def one_token_too_many_in_truncation(patch: Patch) -> None:
    old, new = "limit = data.max_seq_len", "limit = data.max_seq_len + 1"
    _rewrite(patch, pertoken.data.samples, "_chat_samples", old, new)


def one_token_too_few_in_truncation(patch: Patch) -> None:
    old, new = "encoded, 0, min(num_inputs, limit))", "encoded, 0, min(num_inputs, limit - 1))"
    _rewrite(patch, pertoken.data.samples, "_chat_samples", old, new)


def the_same_order_in_every_epoch(patch: Patch) -> None:
    permute = pertoken.data.batch.order.permute
    patch.setattr(
        pertoken.data.batch.order, "permute", lambda positions, **key: permute(positions, **{**key, "epoch": 0})
    )


def seed_ignored(patch: Patch) -> None:
    permute = pertoken.data.batch.order.permute
    patch.setattr(
        pertoken.data.batch.order, "permute", lambda positions, **key: permute(positions, **{**key, "seed": 42})
    )


def not_shuffled(patch: Patch) -> None:
    def in_turn(positions: np.ndarray, *, num_samples: int, seed: int, epoch: int) -> np.ndarray:
        turned: np.ndarray = (np.asarray(positions) + epoch) % num_samples
        return turned

    patch.setattr(pertoken.data.batch.order, "permute", in_turn)


# The schedule.


def lr_one_step_late(patch: Patch) -> None:
    lr_at = pertoken.runs.computation.lr_at
    patch.setattr(pertoken.runs.computation, "lr_at", lambda step, **settings: lr_at(max(1, step - 1), **settings))


def lr_set_after_the_update(patch: Patch) -> None:
    clip_and_step = TrainState.clip_and_step

    def late(self: TrainState, lr: float, *arguments: Any) -> Any:
        before = self.optimizer.param_groups[0]["lr"]
        done = clip_and_step(self, before, *arguments)
        pertoken.training.step.set_lr(self.optimizer, lr)
        return done

    patch.setattr(TrainState, "clip_and_step", late)


def decay_from_the_first_step(patch: Patch) -> None:
    """Warm-up does not count: t is step / total_steps."""
    old, new = "(step - warmup_steps) / max(1, total_steps - warmup_steps)", "step / total_steps"
    seen_by = (pertoken.runs.computation, pertoken.prove.update)
    _rewrite(patch, pertoken.training.schedule, "lr_at", old, new, seen_by=seen_by)


# The norm and clipping.


def clipping_of_matrices_only(patch: Patch) -> None:
    clip = pertoken.training.step.clip

    def matrices(gradients: Sequence[torch.Tensor], max_norm: float, norm: float) -> None:
        clip([gradient for gradient in gradients if gradient.ndim > 1], max_norm, norm)

    patch.setattr(pertoken.training.step, "clip", matrices)


def clipping_twice(patch: Patch) -> None:
    clip = pertoken.training.step.clip

    def twice(gradients: Sequence[torch.Tensor], max_norm: float, norm: float) -> None:
        clip(gradients, max_norm, norm)
        clip(gradients, max_norm, norm)

    patch.setattr(pertoken.training.step, "clip", twice)


def clipping_by_the_largest_gradient(patch: Patch) -> None:
    clip = pertoken.training.step.clip

    def largest(gradients: Sequence[torch.Tensor], max_norm: float, norm: float) -> None:
        clip(gradients, max_norm, max(float(gradient.abs().max()) for gradient in gradients))

    patch.setattr(pertoken.training.step, "clip", largest)


def norm_in_float32(patch: Patch) -> None:
    """torch's own: squares are summed in float32, and in a large vocabulary small ones are lost."""

    def narrow(gradients: Sequence[torch.Tensor], *_: Any) -> float:
        return float(torch.nn.utils.get_total_norm(list(gradients)))

    patch.setattr(pertoken.training.step, "total_norm", narrow)


def norm_of_matrices_only(patch: Patch) -> None:
    total_norm = pertoken.training.step.total_norm

    def matrices(gradients: Sequence[torch.Tensor], *arguments: Any) -> float:
        return total_norm([gradient for gradient in gradients if gradient.ndim > 1], *arguments)

    patch.setattr(pertoken.training.step, "total_norm", matrices)


def unscaling_by_the_last_loss_scale(patch: Patch) -> None:
    unscale = torch.amp.GradScaler.unscale_
    last: dict[int, float] = {}

    def late(self: Any, optimizer: Any) -> None:
        now = self.get_scale()
        unscale(self, optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(now / last.get(id(self), now))
        last[id(self)] = now

    patch.setattr(torch.amp.GradScaler, "unscale_", late)


def reported_norm_after_clipping(patch: Patch) -> None:
    clip_and_step = TrainState.clip_and_step

    def clipped(self: TrainState, lr: float, max_norm: float, *arguments: Any) -> Any:
        norm, skipped = clip_and_step(self, lr, max_norm, *arguments)
        return min(norm, max_norm or math.inf), skipped

    patch.setattr(TrainState, "clip_and_step", clipped)


def float16_boost_kept(patch: Patch) -> None:
    forward = pertoken.objective.cross_entropy._forward

    def unnoted(ctx: Any, *arguments: Any) -> torch.Tensor:
        loss_sum = forward(ctx, *arguments)
        ctx.boost = 1.0
        return loss_sum

    patch.setattr(pertoken.objective.cross_entropy, "_forward", unnoted)


def overflow_not_skipped(patch: Patch) -> None:
    step = TrainState.clip_and_step

    def updates(self: TrainState, lr: float, max_norm: float, *arguments: Any) -> Any:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    torch.nan_to_num_(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)
        return step(self, lr, max_norm, *arguments)

    patch.setattr(TrainState, "clip_and_step", updates)


# The update.


def norms_decay(patch: Patch) -> None:
    old, new = '"weight_decay": 0.0', '"weight_decay": weight_decay'
    seen_by = (pertoken.training.optimizers.adamw, pertoken.training.optimizers.muon)
    _rewrite(patch, pertoken.training.optimizers.optimizer, "decay_groups", old, new, seen_by=seen_by)


def bias_correction_lost(patch: Patch) -> None:
    adamw = pertoken.training.optimizers.adamw.adamw

    def late(*arguments: Any, **settings: Any) -> None:
        arguments = (*arguments[:5], [step + 10_000 for step in arguments[5]])
        adamw(*arguments, **settings)

    patch.setattr(pertoken.training.optimizers.adamw, "adamw", late)


def muon_without_its_shape_factor(patch: Patch) -> None:
    orthogonalized = pertoken.training.optimizers.muon.orthogonalized
    patch.setattr(
        pertoken.training.optimizers.muon, "orthogonalized", lambda x: orthogonalized(x) / math.sqrt(max(x.shape[-2:]))
    )


def rows_reversed_when_read_back(patch: Patch) -> None:
    """The optimizer's, of a sharded run."""
    old, new = 'for file in entry["rows"]]', 'for file in reversed(list(entry["rows"]))]'
    _rewrite(patch, pertoken.checkpoints.read, "whole_optimizer_tensors", old, new)


def rows_reversed_when_sharded(patch: Patch) -> None:
    """Of Muon's update."""
    shard_like = pertoken.training.optimizers.muon.shard_like
    patch.setattr(
        pertoken.training.optimizers.muon, "shard_like", lambda x, parameter: shard_like(x.flip(0), parameter)
    )


# Evaluation.


def evaluation_as_a_mean_of_means(patch: Patch) -> None:
    @torch.no_grad()
    def wrong(model: Any, store: Any, precision: Any, *, token_budget: int, world: World | None = None) -> Evaluation:
        world = world or World()
        cut = pack_micro_batches(store.lengths.tolist(), world_size=world.size, token_budget=token_budget)[world.rank]
        outs = [model(collate([store[i] for i in indices])) for indices in cut]
        means = torch.stack([out.loss_sum / out.num_tokens.clamp(min=1) for out in outs])
        mean = float(world.sum(means.mean().reshape(1).double())) / world.size
        return Evaluation(mean * float(store.num_tokens.sum()), float(store.num_tokens.sum()), store.num_bytes.sum())

    patch.setattr(pertoken.prove.evaluation, "evaluate", wrong)


# Code that a few short samples do not reach.


def second_chunk_lost(patch: Patch) -> None:
    """Of the head's gradient."""
    old, new = "d_weight += torch.mm(d_low_CV.t(), x_CD)\n", "d_weight += torch.mm(d_low_CV.t(), x_CD) * (start == 0)\n"
    _rewrite(patch, pertoken.objective.cross_entropy, "_forward", old, new)


def second_chunk_lost_by_the_kernels(patch: Patch) -> None:
    widen = Kernels.widen_transposed
    patch.setattr(Kernels, "widen_transposed", lambda self, x, out, *, add=False: out if add else widen(self, x, out))


def tail_of_the_vocabulary_without_a_gradient(patch: Patch) -> None:
    cross_entropy = Kernels.cross_entropy

    def by_sixteens(self: Kernels, logits: torch.Tensor, *arguments: Any, gradient: bool) -> torch.Tensor:
        nll = cross_entropy(self, logits, *arguments, gradient=gradient)
        if gradient:
            logits[:, logits.shape[1] // 16 * 16 :] = 0
        return nll

    patch.setattr(Kernels, "cross_entropy", by_sixteens)


def last_block_of_the_vocabulary_lost(patch: Patch) -> None:
    old, new = "range(0, vocab_size, _VOCAB_BLOCK)", "range(0, max(1, vocab_size - _VOCAB_BLOCK), _VOCAB_BLOCK)"
    _rewrite(patch, pertoken.objective.cross_entropy, "_cpu_forward", old, new)


def columns_beyond_a_block_unseen(patch: Patch) -> None:
    forward = Kernels.softmax_forward

    def narrow(self: Kernels, scores: torch.Tensor, log_z: torch.Tensor, limits: torch.Tensor, scale: float) -> None:
        forward(self, scores, log_z, limits.clamp(max=384), scale)

    patch.setattr(Kernels, "softmax_forward", narrow)


def second_block_of_queries_adds_nothing_to_keys(patch: Patch) -> None:
    old = "sums[0] += torch.bmm(d_p.transpose(1, 2), q_B)"
    new = "sums[0] += torch.bmm(d_p.transpose(1, 2), q_B) * (block.block == 0)"
    attention = pertoken.engines.cpu.attention
    _rewrite(patch, attention, "attention_backward", old, new, seen_by=(pertoken.engines.cpu.blocks,))
