"""The arrows of the house: a room imports from lower floors, and on its own floor from rooms listed before it."""

import ast
import graphlib
import runpy
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kornia_tinyvit"

#: From the ground up; docs/architecture.rst says what each room is for.
FLOORS = (
    ("version", "extras", "files", "allocator", "progress"),
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
HEIGHT = {room: number for number, room in enumerate(room for floor in FLOORS for room in floor)}
DOOR = "kornia_tinyvit"  # __init__.py and __main__.py, which may import every room and are imported by none


def name_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows(package: Path) -> dict[str, set[str]]:
    """Return the modules that each module imports, wherever in it: in functions and for type checkers, too."""
    modules = {name_of(path, package): path for path in package.rglob("*.py")}
    found = {}
    for name, path in modules.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} has a relative import"
                wholes = [f"{node.module}.{alias.name}" for alias in node.names]
                imported |= {whole if whole in modules else str(node.module) for whole in wholes}
        found[name] = {module for module in imported if module in modules} - {name}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else DOOR


def wrong_arrows(found: dict[str, set[str]]) -> list[str]:
    """Return the imports that go up, to a later room of the same floor, or through the front door."""
    wrong = []
    for module, imported in found.items():
        for other in imported:
            room, target = room_of(module), room_of(other)
            if room in HEIGHT and room != target and HEIGHT.get(target, len(HEIGHT)) > HEIGHT[room]:
                wrong.append(f"{module} imports {other}")
    return sorted(wrong)


def test_every_room_has_its_floor():
    rooms = {room_of(module) for module in arrows(PACKAGE)} - {DOOR, "__main__"}
    assert rooms == set(HEIGHT)


def test_the_diagram_shows_the_floors(monkeypatch):
    docs = PACKAGE.parent / "docs"
    monkeypatch.syspath_prepend(str(docs))
    drawn = runpy.run_path(str(docs / "draw_diagrams.py"))["ROOMS"]
    assert tuple(rooms for rooms, _ in drawn) == FLOORS[::-1]


def test_imports_go_down():
    assert wrong_arrows(arrows(PACKAGE)) == []


def test_no_circle_between_files():
    try:
        tuple(graphlib.TopologicalSorter(arrows(PACKAGE)).static_order())
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
def test_an_import_that_is_turned_round_is_found(module, line, tmp_path):
    package = tmp_path / "kornia_tinyvit"
    for path in PACKAGE.rglob("*.py"):
        copy = package / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    changed = package / (module.replace(".", "/") + ".py")
    changed.write_text(changed.read_text(encoding="utf-8") + "\n\n" + line + "\n", encoding="utf-8")
    assert len(wrong_arrows(arrows(package))) == len(wrong_arrows(arrows(PACKAGE))) + 1
