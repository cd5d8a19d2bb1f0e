"""The code that a reader would copy runs: README.md and every Python block of the documentation."""

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(page, tmp_path):
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


def test_readme_prints_what_it_says(tmp_path):
    block = next(block for block in code_blocks(ROOT / "README.md", "python") if "forward_intermediates" in block)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import torch\n" + block], capture_output=True, text=True, check=True
    )
    assert f"# {done.stdout.strip()}" in block


def test_links_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.fixture
def run_script(monkeypatch):
    """Run a script of the documentation as a module, and return its names."""
    monkeypatch.syspath_prepend(str(DOCS))
    return lambda name: runpy.run_path(str(DOCS / name))


def test_table_of_the_recipes_is_current(run_script):
    written = (DOCS / "guides" / "outputs" / "recipes.csv").read_text(encoding="utf-8")
    assert written == run_script("record_outputs.py")["recipes_table"]()


class TestNumbers:
    def test_tables_are_what_was_recorded(self, run_script):
        tables = run_script("collect_numbers.py")["tables"]()
        folder = DOCS / "guides" / "outputs"
        assert {path.name for path in folder.glob("numbers_*")} == set(tables)
        for name, text in tables.items():
            assert (folder / name).read_text(encoding="utf-8") == text, "run docs/collect_numbers.py"

    def test_the_page_shows_every_table(self, run_script):
        page = (DOCS / "guides" / "numbers.rst").read_text(encoding="utf-8")
        for name in run_script("collect_numbers.py")["tables"]():
            assert f"outputs/{name}" in page

    def test_a_number_that_is_gone_is_missed(self, run_script):
        source = run_script("collect_numbers.py")["Source"]
        gone = source("benchmarks/eager.txt", (("speed of light", "{} m/s", r"(\d+) m/s"),))
        with pytest.raises(ValueError, match="speed of light"):
            gone.to_rst()

    @pytest.mark.parametrize("kind", ["eager", "deploy"])
    def test_the_readme_rounds_what_was_recorded(self, kind):
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
        settings = (DOCS / "conf.py").read_text(encoding="utf-8")  # name the style sheet and the icon
        pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
        assert path.name in settings or f"_static/{path.name}" in pages


def test_landing_page_leads_to_every_page():
    links = re.findall(r":link: (\S+)", (DOCS / "index.rst").read_text(encoding="utf-8"))
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.rst")} - {"index"}
    assert sorted(links) == sorted(pages)


# Methods that torch and transformers call by themselves.
HOOKS = {"extra_repr", "train", "validate", "get_input_embeddings", "backend"}
MODULES = [
    module.name
    for module in pkgutil.walk_packages(kornia_tinyvit.__path__, "kornia_tinyvit.")
    if not module.name.startswith(("kornia_tinyvit.cli", "kornia_tinyvit.__"))
]


def documented() -> dict[str, list[str] | None]:
    """Return what docs/api.rst lists: its full name, and the members listed with it, or None for all."""
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


def public_functions(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Return the functions, methods and properties that a module offers."""
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
        listed = {full.rpartition(".")[2]: [] for full in documented()}
        for full in documented():
            listed[full.rpartition(".")[2]].append(resolve(full))
        for each in getattr(module, "__all__", ()):
            assert any(value is getattr(module, each) for value in listed.get(each, ())), f"{name}.{each}"

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
            needed = (
                others[:-1] if first is not None and first.name in ("self", "cls") else signature.parameters.values()
            )
            assert all(parameter.annotation is not inspect.Parameter.empty for parameter in needed), each
            assert signature.return_annotation is not inspect.Signature.empty, each
            annotations = " ".join(map(str, getattr(inspect.unwrap(function), "__annotations__", {}).values()))
            tensors = re.sub(r"(dict|Mapping)\[str, Tensor\]", "", annotations)
            if re.search(r"\bTensor\b", tensors):
                # A shape, or the function whose shapes they are.
                assert re.search(r":math:|:meth:|:func:|:class:", function.__doc__), f"{name}.{each} tells no shape"
