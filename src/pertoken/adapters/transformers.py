"""The objective inside `transformers.Trainer` and trainers built on it (TRL's `SFTTrainer`), without logits.

    from trl import SFTTrainer
    from pertoken.adapters.transformers import PerTokenLoss

    class Trainer(PerTokenLoss, SFTTrainer):
        pass

The trainer then counts the supervised tokens of a whole step, over its accumulation steps and its processes, and every
one of them adds `nll / count`. See docs/transformers.md.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pertoken.errors import ModelError, RecipeError
from pertoken.hf_fallback.head import check_logits, linear_head, logit_map_of
from pertoken.objective.cross_entropy import linear_cross_entropy

__all__ = ["PerTokenLoss", "fuse_loss"]

Model = TypeVar("Model")

_IGNORED = -100  # the label that transformers' losses skip
_OWN_LOSSES = ("transformers.trainer", "trl.trainer.sft_trainer")  # the modules whose loss PerTokenLoss stands in for
_FOR_LOGITS = ("logits_to_keep", "skip_logits", "return_dict")  # what the head's part of a forward pass takes


def fuse_loss(model: Model) -> Model:
    """Let a transformers causal language model compute its loss without logits: its forward is replaced in place.

    Called with `labels` [B, T] (not shifted, -100 where nothing is supervised) or `shift_labels`, it returns `loss` and
    `logits=None`. The loss is what transformers defines: the sum of negative log-likelihoods over supervised tokens,
    divided by `num_items_in_batch`, or by their own number where that is not given. Without a supervised token it is
    zero (transformers' is NaN). Called without labels, or with `with_logits=True`, the model does what it did before,
    so generation does not change.

    Raises ModelError for a model whose logits are more than hidden states times the head's weight, scaled and capped
    (a bias, say), and, when called, for a mixture of experts that is asked for its balance loss.
    """
    target: Any = model
    if hasattr(target, "get_base_model"):  # PEFT's wrapper, which calls the model within
        target = target.get_base_model()
    check_logits(target)
    plain_forward = target.forward
    names = list(inspect.signature(type(target).forward).parameters)[1:]

    @functools.wraps(type(target).forward)  # trainers and `generate` read the signature
    def forward(self: Any, *args: Any, with_logits: bool = False, **kwargs: Any) -> Any:
        kwargs |= dict(zip(names, args, strict=False))
        if with_logits or (kwargs.get("labels") is None and kwargs.get("shift_labels") is None):
            return plain_forward(**kwargs)
        return _loss_alone(self, **kwargs)

    target.forward = types.MethodType(forward, target)
    target.accepts_loss_kwargs = True  # so that Trainer passes num_items_in_batch
    return model


def _loss_alone(
    model: Any,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    **inputs: Any,
) -> Any:
    """`CausalLMOutputWithPast(loss=...)`."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    if inputs.get("output_router_logits", getattr(model.config.get_text_config(), "output_router_logits", False)):
        raise ModelError(
            "output_router_logits=True: the balance loss of a mixture of experts is not computed here; set it to false "
            "(SFTTrainer: router_aux_loss_coef=0.0)"
        )
    base, head = linear_head(model)
    inputs = {key: value for key, value in inputs.items() if key not in _FOR_LOGITS} | {"use_cache": False}
    out = base(**inputs)
    hidden = out[0].to(head.weight.device)
    if shift_labels is None:  # the shift by one, here and nowhere else
        assert labels is not None
        shift_labels = F.pad(labels[:, 1:], (0, 1), value=_IGNORED)
    targets = shift_labels.to(hidden.device).flatten()
    mask, logit_map = targets != _IGNORED, logit_map_of(model)
    sums = linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets, mask, logit_map=logit_map)
    count = sums.num_tokens if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=hidden.device)
    return CausalLMOutputWithPast(
        loss=sums.loss_sum / count.clamp(min=1),
        logits=None,
        hidden_states=getattr(out, "hidden_states", None),
        attentions=getattr(out, "attentions", None),
    )


class PerTokenLoss:
    """Put before `transformers.Trainer`, or a trainer built on it, in a class's bases.

    The loss is computed by `fuse_loss`. In training it is the mean over all supervised tokens of a step; in evaluation
    over all of the data, where Trainer has a mean of batch means. (On several processes accelerate repeats samples to
    make their numbers even, and these count again.) What needs logits still has them: `compute_metrics` and `predict`
    go through the model's own forward pass, a batch at a time. SFTTrainer's `entropy`, `mean_token_accuracy` and
    `num_tokens` are not logged.

    Raises ModelError as `fuse_loss` does, and RecipeError for settings, and for trainers, that have another loss.
    """

    model: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        parent.__init__(*args, **kwargs)
        _refuse_other_losses(self, parent.compute_loss)
        fuse_loss(self.model)
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

    def call_model_init(self, trial: Any = None) -> Any:
        parent: Any = super()
        return fuse_loss(parent.call_model_init(trial))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        from transformers import Trainer

        if not self.model.training:
            num_items_in_batch = None  # the batch's own mean, which prediction_step turns back into a sum
        elif model is self.model and _needs_ddp(self):
            raise RecipeError(
                "evaluate: was called before train on several processes, after which transformers trains each on its "
                "own, gradients unsynchronized; call train first, or make a new trainer"
            )
        # Trainer's own, past SFTTrainer's, which has a fused loss too and would not see this model's
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        from transformers import Trainer

        num_tokens = 0
        if "shift_labels" in inputs:
            num_tokens = int((inputs["shift_labels"] != _IGNORED).sum())
        elif "labels" in inputs:
            num_tokens = int((inputs["labels"][:, 1:] != _IGNORED).sum())
        if not prediction_loss_only:
            inputs = {**inputs, "with_logits": True}
        result = Trainer.prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)
        if num_tokens:  # the mean of none is NaN where the model computes it
            self._loss_sum += float(result[0]) * num_tokens
            self._num_tokens += num_tokens
        return result

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        self._loss_sum, self._num_tokens = 0.0, 0
        parent: Any = super()
        output = parent.evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = torch.tensor([self._loss_sum, self._num_tokens], dtype=torch.float64, device=self.accelerator.device)
        loss_sum, num_tokens = self.accelerator.reduce(sums, "sum").tolist()
        if num_tokens:
            output.metrics[f"{metric_key_prefix}_loss"] = loss_sum / num_tokens
        return output


def _needs_ddp(trainer: Any) -> bool:
    """Several processes, and neither FSDP nor DeepSpeed nor the model itself sees to the gradients."""
    by_itself = getattr(trainer, "is_distributed_loading_by_transformers", False)
    return trainer.accelerator.distributed_type.value.startswith("MULTI_") and not by_itself


def _refuse_other_losses(trainer: Any, compute_loss: Any) -> None:
    """`compute_loss` is the one that the trainer would have without the adapter."""
    args = trainer.args
    if compute_loss.__module__ not in _OWN_LOSSES:
        raise RecipeError(f"{compute_loss.__qualname__}: is a loss of its own, which PerTokenLoss would replace")
    if args.label_smoothing_factor:
        raise RecipeError(f"label_smoothing_factor={args.label_smoothing_factor}: needs all logits; set it to 0")
    if trainer.compute_loss_func is not None:
        raise RecipeError("compute_loss_func: would replace the loss; leave it out")
    if getattr(args, "loss_type", "nll") != "nll":
        raise RecipeError(f'loss_type="{args.loss_type}": is another loss; set it to "nll"')
    if getattr(trainer, "aux_loss_enabled", False):
        raise RecipeError(
            f"router_aux_loss_coef={trainer.router_aux_loss_coef}: the balance loss of a mixture of experts is not "
            "computed here; set it to 0.0"
        )
    if args.n_gpu > 1:
        raise RecipeError(f"n_gpu={args.n_gpu}: DataParallel splits a batch by itself; start a process per GPU")
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise RecipeError("average_tokens_across_devices=False: each process would have its own mean; set it to True")
