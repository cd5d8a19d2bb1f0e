"""README.md and the documentation: Python blocks run, generated files are current, the API reference is complete."""

import functools
import importlib
import inspect
import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kornia_tinyvit
from kornia_tinyvit.checkpoints.catalog import ASSETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.rst"))]


def code_blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    blocks = re.findall(rf"\.\. code-block:: {language}\n(?: +:.*\n)*\n((?:(?:[ ]+.*)?\n)+)", text + "\n")
    return [textwrap.dedent(block) for block in blocks]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks(page, tmp_path):
    blocks = code_blocks(page, "python")
    if not blocks:
        assert "code-block:: python" not in page.read_text(encoding="utf-8")
        return
    shutil.copy(ASSETS / "photos" / "chelsea.png", tmp_path / "photo.jpg")
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    offline = os.environ | {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], cwd=tmp_path, env=offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_printed_shapes_of_the_readme():
    block = next(block for block in code_blocks(ROOT / "README.md", "python") if "forward_intermediates" in block)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import torch\n" + block], capture_output=True, text=True, check=True
    )
    assert f"# {done.stdout.strip()}" in block


def test_links_of_the_readme():
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.fixture
def run_script(monkeypatch):
    """Return a function that runs a script of the documentation and returns its globals."""
    monkeypatch.syspath_prepend(str(DOCS))
    return lambda name: runpy.run_path(str(DOCS / name))


def test_recipes_table_is_current(run_script):
    written = (DOCS / "guides" / "outputs" / "recipes.csv").read_text(encoding="utf-8")
    assert written == run_script("record_outputs.py")["recipes_table"]()


class TestNumbers:
    def test_tables_are_current(self, run_script):
        tables = run_script("collect_numbers.py")["tables"]()
        folder = DOCS / "guides" / "outputs"
        assert {path.name for path in folder.glob("numbers_*")} == set(tables)
        for name, text in tables.items():
            assert (folder / name).read_text(encoding="utf-8") == text, "run docs/collect_numbers.py"

    def test_page_includes_every_table(self, run_script):
        page = (DOCS / "guides" / "numbers.rst").read_text(encoding="utf-8")
        for name in run_script("collect_numbers.py")["tables"]():
            assert f"outputs/{name}" in page

    def test_missing_number(self, run_script):
        source = run_script("collect_numbers.py")["Source"]
        missing = source("benchmarks/eager.txt", (("speed of light", "{} m/s", r"(\d+) m/s"),))
        with pytest.raises(ValueError, match="speed of light"):
            missing.to_rst()

    @pytest.mark.parametrize("kind", ["eager", "deploy"])
    def test_numbers_of_the_readme(self, kind):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        speed = re.search(r"## Speed\n(.*?)\n## ", readme, flags=re.DOTALL)[1]
        table = re.search(rf"benchmarks/{kind}\.py`[^:]*:\n\n((?:\|[^\n]*\n)+)", speed, flags=re.DOTALL)[1]
        recorded = re.findall(r"\d+\.\d+", (ROOT / "benchmarks" / f"{kind}.txt").read_text(encoding="utf-8"))
        shown = [float(number) for number in re.findall(r"\d+\.\d+", "".join(table.splitlines()[2:]))]
        assert shown
        for number in shown:
            assert min(abs(number - float(each)) for each in recorded) < 0.0501, number


class TestImages:
    def test_diagrams_are_current(self, run_script):
        for name, text in run_script("draw_diagrams.py")["diagrams"]().items():
            assert (DOCS / "_static" / name).read_text(encoding="utf-8") == text, "run docs/draw_diagrams.py"

    @pytest.mark.parametrize("path", sorted((DOCS / "_static").iterdir()), ids=lambda path: path.name)
    def test_images_are_small_and_used(self, path):
        assert path.stat().st_size < 400_000
        settings = (DOCS / "conf.py").read_text(encoding="utf-8")  # uses the style sheet and the icon
        pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
        assert path.name in settings or f"_static/{path.name}" in pages


def test_landing_page_links_to_every_page():
    links = re.findall(r":link: (\S+)", (DOCS / "index.rst").read_text(encoding="utf-8"))
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.rst")} - {"index"}
    assert sorted(links) == sorted(pages)


# Methods that torch and transformers call.
HOOKS = {"extra_repr", "train", "validate", "get_input_embeddings", "backend"}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(kornia_tinyvit.__path__, "kornia_tinyvit.")
    if not module.name.startswith(("kornia_tinyvit.cli", "kornia_tinyvit.__"))
]


@functools.cache
def documented() -> dict[str, list[str] | None]:
    """Return the full names in docs/api.rst, each with its listed members, or None for all."""
    text = (DOCS / "api.rst").read_text(encoding="utf-8")
    text = re.sub(r",\n +", ", ", text)
    found: dict[str, list[str] | None] = {}
    module = name = ""
    for line in text.splitlines():
        if match := re.match(r"\.\. (?:auto)?module:: (\S+)", line):
            module, name = match[1], ""
        elif match := re.match(r"\.\. auto(?:class|function|data|exception):: (\S+)", line):
            name = match[1] if match[1].startswith("kornia_tinyvit.") else f"{module}.{match[1]}"
            found[name] = []
        elif match := re.match(r" +:members:(.*)", line):
            members = [member.strip() for member in match[1].split(",") if member.strip()]
            if name:
                found[name] = members or None
            else:
                found |= {f"{module}.{member}": None for member in members}
    return found


def resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@functools.cache
def documented_objects() -> dict[str, list[Any]]:
    """Return the objects in docs/api.rst by their last name."""
    objects: dict[str, list[Any]] = {}
    for full in documented():
        objects.setdefault(full.rpartition(".")[2], []).append(resolve(full))
    return objects


def public_functions(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Return the public functions, methods and properties of a module."""
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value) and value.__module__ == module.__name__:
            for method in public_methods(value):
                found = inspect.getattr_static(value, method)
                yield f"{name}.{method}", getattr(found, "fget", None) or getattr(found, "__func__", found)


def public_methods(kind: type) -> list[str]:
    kinds = (classmethod, staticmethod, property)
    return [
        name
        for name, value in vars(kind).items()
        if not name.startswith("_") and name not in HOOKS and (inspect.isfunction(value) or isinstance(value, kinds))
    ]


class TestApi:
    @pytest.mark.parametrize("name", ["kornia_tinyvit", *MODULES])
    def test_every_public_name_is_listed(self, name):
        module = importlib.import_module(name)
        for each in getattr(module, "__all__", ()):
            objects = documented_objects().get(each, ())
            assert any(value is getattr(module, each) for value in objects), f"{name}.{each}"

    def test_every_method_is_listed(self):
        for name, members in documented().items():
            value = resolve(name)
            if inspect.isclass(value) and members is not None:
                assert set(public_methods(value)) <= set(members), name

    @pytest.mark.parametrize("name", MODULES)
    def test_types_and_shapes(self, name):
        for each, function in public_functions(importlib.import_module(name)):
            signature = inspect.signature(inspect.unwrap(function))
            first, *others = [*signature.parameters.values(), None]
            is_method = first is not None and first.name in ("self", "cls")
            parameters = others[:-1] if is_method else signature.parameters.values()
            assert all(parameter.annotation is not inspect.Parameter.empty for parameter in parameters), each
            assert signature.return_annotation is not inspect.Signature.empty, each
            annotations = " ".join(map(str, getattr(inspect.unwrap(function), "__annotations__", {}).values()))
            tensors = re.sub(r"(dict|Mapping)\[str, Tensor\]", "", annotations)
            if re.search(r"\bTensor\b", tensors):
                # A shape, or a reference to the object that documents it.
                assert re.search(r":math:|:meth:|:func:|:class:", function.__doc__), f"{name}.{each} has no shape"
