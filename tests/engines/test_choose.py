"""Which engine runs a model, what is said of it, and that each engine sees what a user has changed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from decoder_cases import BATCHES, batch_of, model_of
from tiny import pertoken
from torch import nn

from pertoken.engines import torch_compile
from pertoken.engines.choose import choose_engine
from pertoken.engines.torch_compile import not_compiled
from pertoken.errors import RecipeError
from pertoken.model.blocks import Layer

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def chosen(how, *, dtype="float32", device=CPU, total_steps=10, before=None):
    model = model_of({}, torch.float32)
    return choose_engine(model, how, dtype=dtype, device=device, total_steps=total_steps, before=before)


def test_kernels_are_not_for_cuda():
    with pytest.raises(RecipeError, match=r'^train\.engine="cpu": train\.device is cuda; use "auto", "compile" or'):
        chosen("cpu", device=CUDA)


def test_torch_compile_on_a_cpu_needs_a_compiler_and_says_so(monkeypatch):
    monkeypatch.setattr(torch_compile, "has_compiler", lambda: False)
    with pytest.raises(
        RecipeError, match=r'^train\.engine="compile": .*no C\+\+ compiler; set it to "auto" or "plain"'
    ):
        chosen("compile")


def test_every_choice_says_why_there_is_no_faster_engine():
    assert chosen("auto").note == "kernels compiled for this processor"
    assert "not for float64" in chosen("auto", dtype="float64").note
    assert chosen("plain").note == 'as train.engine="plain" says'
    assert chosen("auto", before=False).note == "as when the run was started"
    assert "fewer than 500 steps" in chosen("auto", device=CUDA).note


def test_auto_goes_on_without_torch_compile_where_a_user_has_changed_a_module_and_says_so():
    model, why = model_of({}, torch.float32), "model.layers.1.mlp.up_proj has a forward hook"
    hook(model)
    choice = choose_engine(model, "auto", dtype="bfloat16", device=CUDA, total_steps=1000)
    assert (choice.engine, choice.note, choice.remark) == ("plain", why, f"training without torch.compile: {why}")


def test_the_norm_is_not_by_kernels_where_torch_compile_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch_compile, "has_compiler", lambda: True)
    monkeypatch.setattr(torch_compile, "CompileEngine", lambda: SimpleNamespace(name="compile"))
    assert chosen("compile").kernels("float32", CPU) is None
    assert chosen("cpu").kernels("float32", CPU) is not None
    assert chosen("plain").kernels("float32", CPU) is None


@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_the_start_names_the_engine(world, tmp_path, engine):
    recipe = world.write_recipe(tmp_path / "run", train__max_steps=1, train__engine=engine, data__eval_path=[])
    code, out, err = pertoken("train", recipe)
    assert code == 0, err
    note = "plain: as train.engine=" if engine == "plain" else "cpu: kernels compiled for this processor"
    assert note in " ".join((out + err).split())


def hook(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, out: 2 * out)


def another_block(model):
    class Mine(Layer):
        def plain(self, hidden, *args):
            return 2 * super().plain(hidden, *args)

    model.model.layers[0].__class__ = Mine


def another_attention(model):
    model.model.layers[0].self_attn = nn.Identity()


def compiled_already(model):
    model.model.layers[2]._compiled_call_impl = lambda *args: None


CHANGES = {
    hook: "model.layers.1.mlp.up_proj has a forward hook",
    another_block: "model.layers.0 is a Mine",
    another_attention: "model.layers.0.self_attn is a Identity",
    compiled_already: "model.layers.2 is compiled already",
}


@pytest.mark.parametrize(("change", "why"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_torch_compile_sees_what_it_would_not_look_for_again(change, why):
    model = model_of({}, torch.float32)
    assert not_compiled(model) is None
    change(model)
    assert not_compiled(model) == why
    with pytest.raises(RecipeError, match=rf'^train\.engine="compile": {why}; set it to "auto" or "plain"'):
        choose_engine(model, "compile", dtype="float32", device=CPU, total_steps=1)


def test_a_hook_on_all_modules_is_seen_by_torch_compile():
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert not_compiled(model_of({}, torch.float32)) == "torch.nn has a hook on all modules"
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of the compiler's own imports
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_hook_that_comes_after_compiling_is_called():
    """Its code is compiled without; from then on the modules run plain."""
    from pertoken.engines.torch_compile import CompileEngine
    from pertoken.model.execution import PLAIN, Execution

    model, batch = model_of({}, torch.float32), batch_of(*BATCHES["short"])
    execution = Execution(CompileEngine(backend="eager"))
    before = model(batch, execution).loss_sum
    hook(model)
    assert torch.equal(model(batch, execution).loss_sum, model(batch, PLAIN).loss_sum)
    assert not torch.allclose(before, model(batch, execution).loss_sum)
