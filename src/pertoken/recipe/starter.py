"""The recipes that `pertoken new` prints."""

from __future__ import annotations

from pertoken.data.formats import formats_that_give

__all__ = ["STARTERS"]

_TRAIN = """\
[train]
epochs = 1                      # or max_steps = 1000
batch_size = 16                 # samples per optimizer step, over all micro-batches and ranks
micro_batch_tokens = 8192       # tokens per forward/backward: memory, never the result
learning_rate = {learning_rate}
warmup_steps = 0
schedule = "cosine"             # cosine | linear | constant | wsd
min_lr_ratio = 0.1              # where the schedule ends, as a share of learning_rate
weight_decay = {weight_decay}
grad_clip = 1.0                 # 0: no clipping
on_spike = "warn"               # stop | skip | warn: steps whose gradient norm is far above the last 100 steps' median,
spike_factor = 10.0             # namely by more than this factor; 0: none is. "skip" leaves the update out
dtype = "bfloat16"              # float32 | bfloat16 | float16 | float64; weights and optimizer stay float32
device = "auto"                 # cpu | cuda | mps
parallel = "ddp"                # ddp | fsdp: how several processes share the work (torchrun --nproc-per-node N ...)
seed = 42
# eval_interval = 200           # steps; left out: at the end of every epoch
# max_minutes = 60              # stop, saved, once so many minutes are over

[checkpoint]
# save_interval = 500           # steps; left out: at the end of every epoch. The last step is always saved
keep_last = 2
keep_best = true                # checkpoints/best: the lowest evaluation loss

[log]
log_interval = 10
trackers = []                   # ["csv", "tensorboard", "wandb"]
"""

_MODEL = """\
[model]                         # used when training from scratch; names are Hugging Face's
family = "qwen3"                # qwen3 | qwen2 | llama
hidden_size = 512
num_hidden_layers = 8
num_attention_heads = 8
num_key_value_heads = 4
intermediate_size = 1664
tie_word_embeddings = true
# use_moe = true                # a mixture of experts:
# num_experts = 4
# num_experts_per_tok = 1
"""

STARTERS = {
    "sft": f"""\
# Supervised fine-tuning. Run it with: pertoken train this-file.toml
stage = "sft"
out_dir = "runs/sft"
init_from = "runs/pretrain"     # a run, a Hugging Face model folder, a .gguf or MiniMind .pth; left out: from scratch

# [adapter]                     # train small matrices beside the frozen ones of init_from:
# kind = "lora"
# r = 16
# alpha = 32

[data]
path = "chats.jsonl"            # files, folders or globs; one conversation a line
# eval_path = "held-out.jsonl"  # or hold some rows out:
eval_fraction = 0.02
format = "auto"                 # {" | ".join(formats_that_give("conversation"))}
# tokenizer = "path/to/tokenizer"  # left out: the one that init_from has
max_seq_len = 1024
overlong = "drop"               # drop | truncate | error: longer conversations, counted and reported
on_bad_row = "error"            # error | skip: malformed rows, named by file:line

{_TRAIN.format(learning_rate="2e-5", weight_decay="0.0 ")}""",
    "pretrain": f"""\
# Pretraining from scratch. Run it with: pertoken train this-file.toml
# A tokenizer first:  pertoken tokenizer train corpus.txt --vocab-size 6400 --out tokenizer
stage = "pretrain"
out_dir = "runs/pretrain"

{_MODEL}
[data]
path = "corpus.txt"             # files, folders or globs: a .txt file, or a JSONL row's "text", is one document
tokenizer = "tokenizer"
eval_fraction = 0.01
eval_split = "tail"             # tail: the end of every document; rows: whole documents
max_seq_len = 512               # documents are cut into samples of at most this many tokens; no token is lost

{_TRAIN.format(learning_rate="5e-4", weight_decay="0.1 ")}""",
}
