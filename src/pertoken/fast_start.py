"""What fast starts cost: each place that goes around a library to start sooner, and when it may go.

A start imports what it uses. Some libraries import far more than that for what pertoken asks of them, so a few places
ask otherwise, and rest on something that the library does not promise. They are listed here, to be looked at whenever a
library is updated: where the condition holds, the plain call takes its place again. `tests/test_startup.py` holds the
effect of all of them, `tests/test_fast_start.py` that the places are there.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAST_STARTS", "FastStart"]


@dataclass(frozen=True)
class FastStart:
    """One place. `saves_s` is in CPU seconds of a start, measured with torch 2.13 and transformers 5.23 on a Xeon."""

    place: str  # "module:name"
    instead_of: str
    rests_on: str
    saves_s: float
    until: str


FAST_STARTS = (
    FastStart(
        place="pertoken.training.optimizers.adamw:AdamW",
        instead_of="torch.optim.AdamW.step, whose decorators import torch's compiler",
        rests_on="torch.optim.adamw.adamw, the function that the class calls, and the keys of its state",
        saves_s=1.4,
        until="an optimizer of torch steps without importing torch._dynamo",
    ),
    FastStart(
        place="pertoken.training.optimizers.adamw_bfloat16:AdamWBfloat16",
        instead_of="torch.optim.AdamW.step, as above",
        rests_on="torch.optim.adamw.adamw",
        saves_s=1.4,
        until="an optimizer of torch steps without importing torch._dynamo",
    ),
    FastStart(
        place="pertoken.training.optimizers.optimizer:Optimizer",
        instead_of="Optimizer.add_param_group and zero_grad, which import torch's compiler to keep it away",
        rests_on="what the two methods do to `param_groups` and to gradients",
        saves_s=1.4,
        until="an optimizer of torch is made without importing torch._dynamo",
    ),
    FastStart(
        place="pertoken.engines.torch_compile:CompileEngine.__init__",
        instead_of="torch.compiler.disable as a decorator of attention and of experts",
        rests_on="the plain pass taking the functions to call as arguments, so that an engine can give others",
        saves_s=1.9,
        until="torch.compiler.disable does not import torch._dynamo",
    ),
    FastStart(
        place="pertoken.model.decoder:CausalLM",
        instead_of="Module.to_empty, which asks symbolic algebra how a tensor on meta is laid out",
        rests_on="load_state_dict(assign=True) with tensors of the same shapes",
        saves_s=0.5,
        until="empty_like of a tensor on meta does not import sympy",
    ),
    FastStart(
        place="pertoken.model.blocks:Decoder",
        instead_of="nn.Embedding(...), whose initialization on meta imports torch's compiler",
        rests_on="nn.Embedding.from_pretrained(freeze=False) being the same module",
        saves_s=1.6,
        until="normal_ on meta does not import torch._dynamo",
    ),
    FastStart(
        place="pertoken.data.tokens.trained:TrainedTokenizer",
        instead_of="transformers.AutoTokenizer, for folders that pertoken has written itself",
        rests_on="which files of a folder transformers reads, and what it makes of a config.json beside them",
        saves_s=1.0,
        until="AutoTokenizer is imported in a tenth of a second",
    ),
    FastStart(
        place="pertoken.data.chat.template:render",
        instead_of="the method apply_chat_template, which TrainedTokenizer does not have",
        rests_on="transformers.utils.chat_template_utils.render_jinja_template, the function that the method calls",
        saves_s=1.0,
        until="TrainedTokenizer goes, or transformers documents the function",
    ),
    FastStart(
        place="pertoken.data.store.columns:_array",
        instead_of="pyarrow.array, which imports pandas where it is installed",
        rests_on="the Arrow format's layout of buffers, which is a published standard",
        saves_s=0.3,
        until="pyarrow.array of numpy arrays does not import pandas",
    ),
    FastStart(
        place="pertoken.data.store.columns:_values",
        instead_of="Array.to_numpy, which imports pandas where it is installed",
        rests_on="the Arrow format's layout of buffers, which is a published standard",
        saves_s=0.3,
        until="Array.to_numpy does not import pandas",
    ),
    FastStart(
        place="pertoken.data.store.workers:_start",
        instead_of="multiprocessing, whose workers import the program that was started, and torch with it",
        rests_on="multiprocessing.connection.Connection of an inherited file descriptor",
        saves_s=1.4,  # for each worker
        until="multiprocessing starts workers that import a given module alone",
    ),
    FastStart(
        place="pertoken.cli.commands:command",
        instead_of="the end of the interpreter, which takes apart what torch has loaded",
        rests_on="os._exit after everything is flushed, where no thread, compiler or tracker has more to do",
        saves_s=0.6,
        until="a process that has imported torch ends in a tenth of a second",
    ),
)
