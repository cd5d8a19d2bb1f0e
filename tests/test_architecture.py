"""Imports of the package: a module imports lower layers, and of its own layer the modules listed before it."""

import ast
import graphlib
import runpy
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kornia_tinyvit"

#: From the lowest layer up; described in docs/architecture.rst.
LAYERS = (
    ("version", "extras", "files", "modules", "allocator", "progress", "interruption"),
    ("config", "layers", "images", "preprocessing", "ops"),
    ("checkpoints", "data"),
    ("model", "folding"),
    ("backbone", "classification", "semantic", "detection", "sam"),
    ("deploy", "visualization", "huggingface"),
    ("distillation",),
    ("training",),
    ("contraction",),
    ("web",),
    ("cli",),
)
RANK = {module: number for number, module in enumerate(module for layer in LAYERS for module in layer)}
ROOT = "kornia_tinyvit"  # __init__.py and __main__.py may import every module and are imported by none


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(package: Path) -> dict[str, set[str]]:
    """Return the imports of each module of the package, including those in functions and for type checkers."""
    modules = {module_name(path, package): path for path in package.rglob("*.py")}
    found = {}
    for name, path in modules.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} has a relative import"
                full_names = [f"{node.module}.{alias.name}" for alias in node.names]
                imported |= {full if full in modules else str(node.module) for full in full_names}
        found[name] = {module for module in imported if module in modules} - {name}
    return found


def top_level(module: str) -> str:
    """Return the name directly below the package."""
    return module.split(".")[1] if "." in module else ROOT


def wrong_imports(imports: dict[str, set[str]]) -> list[str]:
    """Return imports of higher layers, of later modules of the same layer, and of the package itself."""
    wrong = []
    for module, imported in imports.items():
        for other in imported:
            source, target = top_level(module), top_level(other)
            if source in RANK and source != target and RANK.get(target, len(RANK)) > RANK[source]:
                wrong.append(f"{module} imports {other}")
    return sorted(wrong)


def test_every_module_has_a_layer():
    modules = {top_level(module) for module in imports_of(PACKAGE)} - {ROOT, "__main__"}
    assert modules == set(RANK)


def test_diagram_shows_the_layers(monkeypatch):
    docs = PACKAGE.parent / "docs"
    monkeypatch.syspath_prepend(str(docs))
    drawn = runpy.run_path(str(docs / "draw_diagrams.py"))["LAYERS"]
    assert tuple(modules for modules, _ in drawn) == LAYERS[::-1]


def test_imports_of_lower_layers_only():
    assert wrong_imports(imports_of(PACKAGE)) == []


def test_no_circular_imports():
    try:
        tuple(graphlib.TopologicalSorter(imports_of(PACKAGE)).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("layers", "from kornia_tinyvit.model import TinyViT"),
        ("semantic", "def f():\n    from kornia_tinyvit import detection"),
        ("data.order", "import kornia_tinyvit.training.loop"),
        ("config", "from kornia_tinyvit import __version__"),
    ],
)
def test_finds_wrong_imports(module, line, tmp_path):
    package = tmp_path / "kornia_tinyvit"
    for path in PACKAGE.rglob("*.py"):
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    changed = package / (module.replace(".", "/") + ".py")
    changed.write_text(changed.read_text(encoding="utf-8") + "\n\n" + line + "\n", encoding="utf-8")
    assert len(wrong_imports(imports_of(package))) == len(wrong_imports(imports_of(PACKAGE))) + 1
