"""The options of other trainers, by their names there, and what each is here.

Meanings were compared with the peers' own definitions; `tests/recipe/test_peers.py` holds those of the installed ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["PEERS", "Option", "said_of"]

_HF, _TRL, _MINIMIND, _FACTORY = "transformers", "TRL", "MiniMind", "LLaMA-Factory"
_AXOLOTL, _SWIFT, _NANOCHAT, _LITGPT, _TORCHTUNE = "axolotl", "ms-swift", "nanochat", "litgpt", "torchtune"


@dataclass(frozen=True)
class Option:
    """What an option of other trainers is here."""

    peers: tuple[str, ...]  # who has it by this name; TRL, LLaMA-Factory and ms-swift take transformers' names too
    kind: Literal["key", "done", "absent"]  # a key here; what is always done; what there is not
    key: str  # dotted; empty unless a key
    remark: str  # where the meaning differs; what is done; the nearest way


def _key(key: str, *peers: str, remark: str = "") -> Option:
    return Option(peers or (_HF,), "key", key, remark)


def _done(what: str, *peers: str) -> Option:
    return Option(peers or (_HF,), "done", "", what)


def _absent(nearest: str, *peers: str) -> Option:
    return Option(peers or (_HF,), "absent", "", nearest)


_GLOBAL = "all samples of a step, so their samples per device x devices x accumulation steps"
_SHARE = "a share of the rows; a number of rows is not taken"
_QUANTIZED = 'weights are kept in float32, with an adapter in model.frozen_dtype = "bfloat16"'
_NO_DROPOUT = "0 alone: with dropout a step's gradient would depend on how the step is split"
_NO_PADDING = "micro-batches contain no padding, and no sample sees another"
_MIXED = '"bfloat16", "float16" or "float32"; weights and optimizer stay float32'
_PATH = "files, folders or names of the hub"
_UPLOAD = "`pertoken export` writes a folder that can be uploaded"
_EXACT = "only what the assistant says is supervised, turn by turn"
_ATTENTION = "train.engine chooses attention, and any choice keeps samples apart"
_INTERVAL = "in steps; each epoch's end where it is left out"
_TEMPLATE = 'the tokenizer\'s where left out; a .jinja file, Jinja text or "chatml"'

PEERS: dict[str, Option] = {
    # how long, how fast
    "num_train_epochs": _key("train.epochs"),
    "num_epochs": _key("train.epochs", _AXOLOTL),
    "max_epochs": _key("train.epochs", _SWIFT),
    "epochs": _key("train.epochs", _MINIMIND, _LITGPT, _TORCHTUNE),
    "max_steps": _key("train.max_steps", _HF, _AXOLOTL, remark="leave it out, rather than -1, to go by epochs"),
    "num_iterations": _key("train.max_steps", _NANOCHAT),
    "train_iters": _key("train.max_steps", _SWIFT),
    "lr": _key("train.learning_rate", _SWIFT, _TORCHTUNE),
    "learning_rate": _key("train.learning_rate", _HF, _MINIMIND, _AXOLOTL),
    "min_lr": _key("train.min_lr_ratio", _LITGPT, _SWIFT, remark="a share of train.learning_rate"),
    "final_lr_frac": _key("train.min_lr_ratio", _NANOCHAT),
    "lr_scheduler_type": _key(
        "train.schedule", remark="ends at train.min_lr_ratio = 0.1 of the peak; set that to 0 for theirs"
    ),
    "lr_scheduler": _key("train.schedule", _AXOLOTL, _TORCHTUNE),
    "warmup_ratio": _key("train.warmup_ratio", _AXOLOTL, _FACTORY, _NANOCHAT),
    "warmup_steps": _key("train.warmup_steps", _HF, _AXOLOTL, remark="a share of all steps is train.warmup_ratio"),
    "warmup_iters": _key("train.warmup_steps", _LITGPT),
    "lr_warmup_steps": _key("train.warmup_steps", _LITGPT),
    "lr_warmup_fraction": _key("train.warmup_ratio", _SWIFT),
    "early_stopping_patience": _key("train.early_stopping", _AXOLOTL, remark="in evaluations"),
    # batches
    "per_device_train_batch_size": _key("train.batch_size", remark=_GLOBAL),
    "gradient_accumulation_steps": _key("train.batch_size", _HF, _AXOLOTL, _TORCHTUNE, remark=_GLOBAL),
    "accumulation_steps": _key("train.batch_size", _MINIMIND, remark=_GLOBAL),
    "batch_size": _key("train.batch_size", _MINIMIND, _TORCHTUNE, remark=_GLOBAL),
    "micro_batch_size": _key("train.batch_size", _AXOLOTL, _LITGPT, _SWIFT, remark=_GLOBAL),
    "global_batch_size": _key("train.batch_size", _LITGPT, _SWIFT),
    "device_batch_size": _key("train.micro_batch_tokens", _NANOCHAT, remark="tokens of a pass, not sequences"),
    "total_batch_size": _key("train.batch_size", _NANOCHAT, remark="samples of a step, not tokens"),
    "per_device_eval_batch_size": _done("evaluation is split as training is, by train.micro_batch_tokens"),
    "auto_find_batch_size": _done("train.micro_batch_tokens is halved where memory runs out"),
    "average_tokens_across_devices": _done("every supervised token counts once, on whichever device"),
    "dataloader_drop_last": _absent("an epoch's last step takes what is left"),
    # data
    "dataset": _key("data.path", _FACTORY, _SWIFT, _TORCHTUNE, remark=_PATH),
    "datasets": _key("data.path", _AXOLOTL, remark=_PATH),
    "dataset_name": _key("data.path", _TRL, remark=_PATH),
    "train_dataset": _key("data.path", _TRL, remark=_PATH),
    "data_path": _key("data.path", _MINIMIND),
    "data": _key("data.path", _LITGPT, remark=_PATH),
    "val_dataset": _key("data.eval_path", _SWIFT),
    "eval_dataset": _key("data.eval_path", _TRL, _FACTORY),
    "val_size": _key("data.eval_fraction", _FACTORY, remark=_SHARE),
    "val_set_size": _key("data.eval_fraction", _AXOLOTL, remark=_SHARE),
    "split_dataset_ratio": _key("data.eval_fraction", _SWIFT),
    "max_samples": _absent("name a shorter file in data.path", _FACTORY),
    "streaming": _done("samples are made once, and read from disk as they are needed", _FACTORY, _SWIFT, _AXOLOTL),
    "dataset_streaming": _done("samples are made once, and read from disk as they are needed", _TRL),
    "max_length": _key("data.max_seq_len", _TRL, _SWIFT, remark='longer rows: data.overlong, "drop" if left out'),
    "max_seq_length": _key("data.max_seq_len", _LITGPT, remark='longer rows: data.overlong, "drop" if left out'),
    "max_seq_len": _key("data.max_seq_len", _MINIMIND, _NANOCHAT, _TORCHTUNE),
    "cutoff_len": _key("data.max_seq_len", _FACTORY, remark='longer rows: data.overlong, "drop" if left out'),
    "sequence_len": _key("data.max_seq_len", _AXOLOTL, remark='longer rows: data.overlong, "drop" if left out'),
    "truncation_mode": _key("data.overlong", _TRL),
    "truncation_strategy": _key("data.overlong", _SWIFT, remark='their "delete" is "drop"'),
    "excess_length_strategy": _key("data.overlong", _AXOLOTL),
    "packing": _done(_NO_PADDING, _TRL, _FACTORY, _SWIFT),
    "neat_packing": _done(_NO_PADDING, _FACTORY),
    "sample_packing": _done(_NO_PADDING, _AXOLOTL),
    "eval_packing": _done(_NO_PADDING, _TRL),
    "padding_free": _done(_NO_PADDING, _TRL, _SWIFT),
    "pad_to_sequence_len": _done(_NO_PADDING, _AXOLOTL),
    "group_by_length": _done("micro-batches contain no padding, in whichever order", _AXOLOTL),
    "pad_token": _done(_NO_PADDING, _TRL),
    "dataset_num_proc": _key("data.workers", _TRL, _SWIFT),
    "preprocessing_num_workers": _key("data.workers", _FACTORY),
    "dataset_processes": _key("data.workers", _AXOLOTL),
    "dataloader_num_workers": _done("samples are read from memory-mapped files; data.workers prepares them", _HF),
    "num_workers": _done("samples are read from memory-mapped files; data.workers prepares them", _MINIMIND),
    "dataset_prepared_path": _key("data.store", _AXOLOTL),
    "dataset_text_field": _key("data.text_key", _TRL),
    "template": _key("data.chat_template", _FACTORY, _SWIFT, remark=_TEMPLATE),
    "chat_template": _key("data.chat_template", _AXOLOTL, remark=_TEMPLATE),
    "chat_template_path": _key("data.chat_template", _TRL, remark=_TEMPLATE),
    "chat_template_kwargs": _key("data.template_kwargs", _AXOLOTL),
    "eos_token": _key("data.end_of_turn", _TRL, remark="only for templates that end no turn with a token"),
    "new_special_tokens": _key("data.add_tokens", _SWIFT),
    "add_special_tokens": _key("data.add_tokens", _FACTORY),
    "system": _absent("write it as the first message of each row", _SWIFT),
    "default_system": _absent("write it as the first message of each row", _FACTORY),
    # what is supervised
    "assistant_only_loss": _done(_EXACT, _TRL),
    "completion_only_loss": _done("of a prompt and its completion, the completion is supervised", _TRL),
    "train_on_inputs": _absent("what users say is never supervised", _AXOLOTL),
    "train_on_prompt": _absent("what users say is never supervised", _FACTORY),
    "roles_to_train": _absent(_EXACT, _AXOLOTL),
    "mask_history": _key("data.supervise", _FACTORY, remark='true is "last"'),
    "loss_scale": _absent("a message's weight in the data scales its loss", _SWIFT),
    # the model
    "model_name_or_path": _key("init_from", _TRL, _FACTORY),
    "model": _key("init_from", _TRL, _SWIFT, remark="[model] is for a model from scratch"),
    "base_model": _key("init_from", _AXOLOTL),
    "checkpoint_dir": _key("init_from", _LITGPT),
    "from_weight": _key("init_from", _MINIMIND),
    "hidden_size": _key("model.hidden_size", _MINIMIND),
    "num_hidden_layers": _key("model.num_hidden_layers", _MINIMIND),
    "depth": _key("model.num_hidden_layers", _NANOCHAT),
    "use_moe": _key("model.use_moe", _MINIMIND),
    "router_aux_loss_coef": _key("model.aux_loss_coef", _TRL),
    "trust_remote_code": _absent("code that a folder brings is never run", _TRL, _FACTORY, _AXOLOTL),
    "lora_r": _key("adapter.r", _TRL, _AXOLOTL),
    "lora_rank": _key("adapter.r", _FACTORY, _SWIFT),
    "lora_alpha": _key("adapter.alpha", _TRL, _FACTORY, _AXOLOTL, _SWIFT),
    "lora_dropout": _key("adapter.dropout", _TRL, _FACTORY, _AXOLOTL, _SWIFT, remark=_NO_DROPOUT),
    "lora_target": _key("adapter.targets", _FACTORY),
    "lora_target_modules": _key("adapter.targets", _TRL, _AXOLOTL),
    "target_modules": _key("adapter.targets", _SWIFT),
    "use_peft": _key("adapter.kind", _TRL, remark='"lora", or "none" for all weights'),
    "finetuning_type": _key("adapter.kind", _FACTORY, remark='"lora", or "none" for all weights'),
    "load_in_4bit": _absent(_QUANTIZED, _TRL, _AXOLOTL),
    "load_in_8bit": _absent(_QUANTIZED, _TRL, _AXOLOTL),
    # the optimizer
    "optim": _key("train.optimizer"),
    "adam_beta1": _key("train.betas", remark="both in one list"),
    "adam_beta2": _key("train.betas", remark="both in one list"),
    "adam_epsilon": _absent("it is 1e-8"),
    "weight_decay": _key("train.weight_decay", _HF, _AXOLOTL, remark="0.01 where it is left out"),
    "max_grad_norm": _key("train.grad_clip", _HF, _AXOLOTL),
    "clip_grad_norm": _key("train.grad_clip", _TORCHTUNE),
    "max_norm": _key("train.grad_clip", _LITGPT),
    "grad_clip": _key("train.grad_clip", _MINIMIND),
    "neftune_noise_alpha": _absent("nothing is added to embeddings"),
    "label_smoothing_factor": _absent("the loss is the plain cross-entropy"),
    # how it is computed
    "bf16": _key("train.dtype", _HF, _AXOLOTL, remark=_MIXED),
    "fp16": _key("train.dtype", _HF, _AXOLOTL, remark=_MIXED),
    "torch_dtype": _key("train.dtype", _SWIFT, remark=_MIXED),
    "dtype": _key("train.dtype", _TRL, _MINIMIND, _TORCHTUNE, remark=_MIXED),
    "precision": _key("train.dtype", _LITGPT, remark=_MIXED),
    "use_cpu": _key("train.device", remark='"cpu"'),
    "device": _key("train.device", _MINIMIND, _TORCHTUNE),
    "device_type": _key("train.device", _NANOCHAT),
    "gradient_checkpointing": _key("train.activation_checkpointing", _HF, _AXOLOTL),
    "enable_activation_checkpointing": _key("train.activation_checkpointing", _TORCHTUNE),
    "torch_compile": _key("train.engine", remark='"compile"'),
    "use_compile": _key("train.engine", _MINIMIND, remark='"compile"'),
    "compile": _key("train.engine", _TORCHTUNE, remark='"compile"'),
    "use_liger_kernel": _key("train.loss_impl", remark='"liger"'),
    "enable_liger_kernel": _key("train.loss_impl", _FACTORY, remark='"liger"'),
    "attn_implementation": _done(_ATTENTION, _TRL),
    "attn_impl": _done(_ATTENTION, _SWIFT),
    "flash_attn": _done(_ATTENTION, _FACTORY),
    "flash_attention": _done(_ATTENTION, _AXOLOTL),
    "deepspeed": _key("train.parallel", _HF, _AXOLOTL, remark='"fsdp" shards weights and optimizer, under torchrun'),
    "fsdp": _key("train.parallel", _HF, _AXOLOTL, remark='"fsdp", under torchrun'),
    "ddp_find_unused_parameters": _done("every parameter takes part in every step"),
    "seed": _key("train.seed", _HF, _AXOLOTL, _LITGPT, _TORCHTUNE),
    "data_seed": _key("train.seed", remark="one seed, for the first weights and the order of samples"),
    # evaluating, saving, showing
    "eval_steps": _key("train.eval_interval", _HF, _AXOLOTL, remark=_INTERVAL),
    "eval_strategy": _key("train.eval_interval", _HF, _AXOLOTL, remark=_INTERVAL),
    "evals_per_epoch": _key("train.eval_interval", _AXOLOTL, remark=_INTERVAL),
    "eval_every": _key("train.eval_interval", _NANOCHAT),
    "save_steps": _key("checkpoint.save_interval", _HF, _AXOLOTL, remark=_INTERVAL),
    "save_strategy": _key("checkpoint.save_interval", _HF, _AXOLOTL, remark=_INTERVAL),
    "saves_per_epoch": _key("checkpoint.save_interval", _AXOLOTL, remark=_INTERVAL),
    "save_every": _key("checkpoint.save_interval", _NANOCHAT),
    "save_interval": _key("checkpoint.save_interval", _MINIMIND, _LITGPT),
    "save_total_limit": _key("checkpoint.keep_last", _HF, _AXOLOTL),
    "save_only_model": _key("checkpoint.save_optimizer", _HF, _AXOLOTL, remark="the other way round: true is false"),
    "load_best_model_at_end": _key("checkpoint.keep_best", _HF, _AXOLOTL, remark="the best is checkpoints/best"),
    "resume_from_checkpoint": _absent("train with resume=True", _HF, _AXOLOTL, _TORCHTUNE),
    "from_resume": _absent("train with resume=True", _MINIMIND),
    "overwrite_output_dir": _absent("train with overwrite=True", _FACTORY),
    "output_dir": _key("out_dir", _HF, _AXOLOTL, _TORCHTUNE),
    "save_dir": _key("out_dir", _MINIMIND),
    "logging_steps": _key("log.log_interval", _HF, _AXOLOTL, remark="metrics.jsonl has every step"),
    "log_every_n_steps": _key("log.log_interval", _TORCHTUNE, remark="metrics.jsonl has every step"),
    "log_interval": _key("log.log_interval", _MINIMIND, _LITGPT),
    "report_to": _key("log.trackers"),
    "use_wandb": _key("log.trackers", _MINIMIND, remark='"wandb"'),
    "logger_name": _key("log.trackers", _LITGPT),
    "wandb_project": _key("log.project", _MINIMIND, _AXOLOTL),
    "run_name": _absent("runs are told apart by out_dir, and log.project groups them"),
    "hub_model_id": _absent(_UPLOAD, _HF, _AXOLOTL),
    "push_to_hub": _absent(_UPLOAD),
}


def said_of(name: str) -> str | None:
    """What the option `name` of other trainers is here, for whoever wrote it into a recipe; None if none has it."""
    option = PEERS.get(name)
    if option is None:
        return None
    whose = f"{option.peers[0]}{chr(39) if option.peers[0].endswith('s') else chr(39) + 's'} {name}"
    if option.kind == "key":
        return f"{whose} is {option.key} here" + (f" ({option.remark})" if option.remark else "")
    if option.kind == "done":
        return f"{whose} needs nothing here: {option.remark}"
    return f"{whose} is not there; {option.remark}"
