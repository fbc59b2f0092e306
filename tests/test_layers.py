"""Imports point one way, importing does nothing, and nothing below the command line prints."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import pertoken

SOURCE = Path(pertoken.__file__).parent
LAYERS = [
    {"errors", "text", "files", "gguf_file", "fast_start"},
    {"hub"},
    {"families"},
    {"data.batch", "data.files"},
    {"data.formats"},  # which the recipe names
    {"recipe"},
    {"data.tokens"},
    {"data.chat"},
    {"data.findings", "data.formats_found", "data.outcome", "data.samples", "data.typed", "data.view"},
    {"data.store"},
    {"data"},
    {"kernels"},
    {"objective"},
    {"model"},
    {"engines"},
    {"hf_fallback"},
    {"folders"},
    {"training"},
    {"checkpoints"},
    {"tracking"},
    {"runs"},
    {"inference", "prove", "adapters"},
    {"audit"},
    {"report"},
    {"console"},
    {"demo"},
    {"cli", "__main__"},
]
FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")  # which re-exports, lazily


def room_of(module: str) -> str:
    """Of `pertoken.part...` the part, or `part.room` where the rooms of a part have an order."""
    _, part, *inner = module.split(".")
    return f"{part}.{inner[0]}" if inner and any(f"{part}.{inner[0]}" in names for names in LAYERS) else part


def layer_of(module: str) -> int:
    name = room_of(module)
    return next(i for i, names in enumerate(LAYERS) if name in names)


def module_of(path: Path) -> str:
    return ".".join(("pertoken", *path.relative_to(SOURCE).with_suffix("").parts))


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pertoken."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("pertoken.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down_only(path):
    for module in imports_of(path):
        assert layer_of(module) <= layer_of(module_of(path)), f"{path.name} imports {module} from above"


def test_no_two_rooms_import_each_other():
    """Rooms of one layer included, which `test_imports_point_down_only` would let do so."""
    seen = {(room_of(module_of(path)), room_of(module)) for path in FILES for module in imports_of(path)}
    assert sorted((a, b) for a, b in seen if a < b and (b, a) in seen) == []


def test_plain_modules_know_nothing_of_kernels_and_engines():
    """A decoder's modules are the reference that every engine is measured against."""
    for path in (SOURCE / "model").rglob("*.py"):
        assert not {room_of(module) for module in imports_of(path)} & {"kernels", "engines"}, path


MAKE_MODELS = {"model", "engines", "hf_fallback", "folders"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_only_what_makes_models_asks_which_class_one_is(path):
    """All others know `LanguageModel`. Building one's own from a recipe is no question about its class."""
    if room_of(module_of(path)) in MAKE_MODELS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "cast"):
            names = {n.id for argument in node.args for n in ast.walk(argument) if isinstance(n, ast.Name)}
            assert not names & {"CausalLM", "FallbackLM", "LanguageModel"}, f"{path}:{node.lineno}"


def test_no_import_of_the_data_leads_back_to_where_it_came_from():
    """Those within functions included."""
    imports = {module_of(path).removesuffix(".__init__"): imports_of(path) for path in FILES}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for imported in sorted(imports.get(module, ())):
                walk(imported, (*way, module))
            done.add(module)

    for module in sorted(imports):
        if layer_of(module) <= LAYERS.index({"data"}):
            walk(module, ())


BELOW_THE_COMMAND_LINE = [path for path in FILES if layer_of(module_of(path)) < LAYERS.index({"console"})]


@pytest.mark.parametrize("path", BELOW_THE_COMMAND_LINE, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_below_the_command_line_prints(path):
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def test_data_knows_nothing_of_networks():
    for path in (SOURCE / "data").rglob("*.py"):
        assert "torch.nn" not in path.read_text(), path


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_importing_pertoken_loads_nothing_heavy():
    heavy = "torch numpy transformers pyarrow pydantic typer rich"
    assert run(f"import sys, pertoken; print([m for m in '{heavy}'.split() if m in sys.modules])") == "[]"


def test_help_answers_without_torch_in_under_three_tenths_of_a_second():
    code = "import sys; sys.argv = ['pertoken', '--help']\nfrom pertoken.cli.commands import app\n"
    code += "try: app()\nexcept SystemExit: print('torch' in sys.modules, 'pydantic' in sys.modules)"
    assert run(code).endswith("False False")
    times = []  # of the processor: other processes may take it meanwhile
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "pertoken", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3, times


def test_public_names_are_all_there():
    for name in pertoken.__all__:
        assert getattr(pertoken, name) is not None or name == "__version__"
    assert callable(pertoken.train)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pertoken.nonsense
