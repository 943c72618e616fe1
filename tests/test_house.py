"""The house: which room may import which."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms from left to right; a file imports only from its own room and from rooms to its left.
ROOMS = (
    {"config", "allocator", "cores", "fields", "differences", "validation", "nn", "processes", "costs"},
    {"model", "parallel", "fsdp", "sharded_attention", "data", "compilation"},
    {"checkpoint", "run_directory", "manifest", "arrays"},
    {"generation", "token_generation", "sampling", "decoding", "generation_memory", "beams", "streaming"},
    {"evaluation"},
    {"training"},
    {"interop", "observe"},
    {"api", "output", "cli", "launch", "scored_text", "plan", "forecast"},
    {"commands", "__main__"},
)
FILES = sorted(path for path in (ROOT / "lm").rglob("*.py") if path != ROOT / "lm" / "__init__.py")


def room(module: str) -> int:
    name = module.split(".")[1]
    found = [number for number, names in enumerate(ROOMS) if name in names]
    assert found, f"lm.{name} stands in no room: put it in ROOMS"
    return found[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it; of `from lm import x` it is lm.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            files = {module_of(file) for file in FILES}
            found |= (inner & files) or {str(node.module)}
    return found


def inside(path: Path) -> set[str]:
    return {name for name in imports(path) if name.startswith("lm.")}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_only_from_the_left(path):
    for name in inside(path):
        assert room(name) <= room(module_of(path)), f"{module_of(path)} imports {name}, to its right"


def test_no_circle():
    graph = {module_of(path): inside(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_check_sees_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from lm.training import loop\n    import lm.api\n")
    assert inside(wrong) == {"lm.training.loop", "lm.api"}
    assert room("lm.training.loop") > room("lm.nn.attention")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_flax_only_in_the_model_and_pure_maths_pure(path):
    top = {name.split(".")[0] for name in imports(path)}
    assert "flax" not in top or path == ROOT / "lm" / "model.py"
    if "nn" in path.parts:
        # NumPy for what is known when a program is traced
        assert top <= {"__future__", "collections", "functools", "math", "typing", "zlib", "jax", "lm", "numpy"}
