"""What may import what, and what `import dsla` may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsla

ROOT = Path(dsla.__file__).parent

LAYERS = (
    ("errors",),
    ("schema", "storage", "checkpoint", "from_gguf", "client"),
    ("default_model",),
    ("hub",),
    ("ops",),
    ("mixers",),
    ("families",),
    ("convert",),
    ("sensitivity", "distill", "evals", "engine"),
    ("adaptive",),
    ("server",),
    ("bench",),
    ("cli",),
)
"""Every unit of the package, lowest first; a unit imports itself and what is below it, and its neighbours as listed."""

NEIGHBOURS = {("sensitivity", "distill"), ("evals", "distill"), ("checkpoint", "storage"), ("from_gguf", "checkpoint")}

RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}

HEAVY = {
    "transformers", "fastapi", "starlette", "uvicorn", "pydantic", "triton", "matplotlib", "typer", "rich", "yaml",
    "zstandard", "gguf", "accelerate", "huggingface_hub", "filelock", "hypothesis", "pytest",
    "lm_eval", "datasets", "pandas", "prometheus_client", "llguidance",
}  # fmt: skip

AT_TOP = {
    "cli": {"typer", "rich"},
    "server": {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core", "jinja2", "prometheus_client"},
    "convert": {"transformers"},
    "sensitivity": {"transformers"},
    "evals": {"transformers", "lm_eval", "tqdm"},
}
"""What files of a unit may import at their top beyond the core; the rest is imported where it is used."""

CORE = {"torch", "numpy", "safetensors", "tokenizers", "dsla"}

FILES = sorted(ROOT.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(nodes: Iterator[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and full name of every import among `nodes`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def at_top(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that run when the file is imported, without those for the type checker."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            stack.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            stack.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt))


def test_every_unit_has_a_place() -> None:
    units = {unit_of(path) for path in FILES} - {"__init__"}
    assert units <= set(RANK), "a new package or module: give it a place in LAYERS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    unit = unit_of(path)
    wrong = []
    for line, name in imports(ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        parts = name.split(".")
        if parts[0] != "dsla" or parts[1] == "__version__" or unit in ("__init__", parts[1]):
            continue
        if RANK[parts[1]] >= RANK[unit] and (unit, parts[1]) not in NEIGHBOURS:
            wrong.append(f"{path.name}:{line} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_extras_are_imported_where_they_are_used(path: Path) -> None:
    allowed = CORE | AT_TOP.get(unit_of(path), set()) | sys.stdlib_module_names
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [
        f"{path.name}:{line} imports {name}"
        for line, name in imports(at_top(tree))
        if name.split(".")[0] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["dsla", "dsla.ops", "dsla.mixers", "dsla.hub", "dsla.engine", "dsla.adaptive"])
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert sorted(HEAVY & set(result.stdout.split())) == []


def test_import_of_the_package_is_quick() -> None:
    code = "import time; start = time.process_time(); import dsla; print(time.process_time() - start)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    # Loading torch takes ten times as long.
    assert float(result.stdout) < 0.1


def test_load_is_the_one_of_convert() -> None:
    from dsla.convert import load

    assert dsla.load is load
    with pytest.raises(AttributeError, match="has no attribute 'loads'"):
        dsla.loads  # noqa: B018
