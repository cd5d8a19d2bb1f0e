"""The source distribution, the wheel built from it, their metadata, and imports of optional packages."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import kornia_tinyvit
from kornia_tinyvit.checkpoints.catalog import ASSETS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kornia_tinyvit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
#: Requirements of modules with another name, or that are dependencies of a requirement.
PACKAGES = {"PIL": "pillow", "pillow_heif": "pillow-heif", "yaml": "accelerate", "huggingface_hub": "transformers"}
UNPUBLISHED = {".git", ".venv", "build", "dist", "runs", "demo", "_build"}


def build(what: str, source: Path, out: Path) -> Path:
    """Build a distribution with the installed setuptools, without downloads."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, out], cwd=source, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The unpacked source distribution of this checkout, and the wheel built from it."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77 for license expressions: pip install -U setuptools")
    folder = tmp_path_factory.mktemp("packaging")
    ignore = shutil.ignore_patterns(*UNPUBLISHED, ".*_cache", ".hypothesis", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, folder / "checkout", ignore=ignore)
    for name in ("source", "wheel", "unpacked"):
        (folder / name).mkdir()
    with tarfile.open(build("sdist", folder / "checkout", folder / "source")) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # since Python 3.11.4
        archive.extractall(folder / "unpacked")
    (source,) = (folder / "unpacked").iterdir()
    return source, build("wheel", source, folder / "wheel")


@pytest.mark.slow
def test_content_of_the_wheel(built):
    _, wheel = built
    assert wheel.name == f"kornia_tinyvit-{PROJECT['version']}-py3-none-any.whl"
    assert wheel.stat().st_size < 10e6
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("dist-info/licenses/LICENSE")]
    here = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".pyo")}
    assert names == {path.relative_to(ROOT).as_posix() for path in here}
    assert {"kornia_tinyvit/py.typed", *(path.relative_to(ROOT).as_posix() for path in ASSETS.glob("*.*"))} <= names
    assert licenses


@pytest.mark.slow
def test_content_of_the_source_distribution(built):
    source, _ = built
    for folder in ("tests", "examples", "benchmarks", "docs"):
        here = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.*") if path.is_file()}
        kept = {path for path in here if not {"_build", "__pycache__"} & set(path.parts)}
        assert not {path for path in kept if not (source / path).exists()}
    for name in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "CITATION.cff",
        "LICENSE",
        "Makefile",
        "constraints.txt",
    ):
        assert (source / name).exists()
    assert not list(source.rglob("*.pyc"))


@pytest.mark.slow
def test_no_paths_of_a_machine(built):
    source, _ = built
    paths = re.compile(rb"/(?:home|root|Users|work|opt)/")
    texts = [
        path for path in source.rglob("*") if path.suffix in (".py", ".md", ".rst", ".txt", ".toml", ".cfg", ".json")
    ]
    assert texts
    assert not [str(path) for path in texts if path.name != Path(__file__).name and paths.search(path.read_bytes())]


def test_versions_agree():
    assert kornia_tinyvit.__version__ == PROJECT["version"]
    assert (
        re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
        == (PROJECT["version"])
    )


def test_changelog_is_versioned():
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    versions = headings[headings[0] == "[Unreleased]" :]
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in versions)
    numbers = [tuple(map(int, re.findall(r"\d+", heading)[:3])) for heading in versions]
    assert numbers == sorted(set(numbers), reverse=True)
    assert versions[0].startswith(f"[{PROJECT['version']}]")
    parts = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(parts) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_extras_in_errors_exist():
    named = {extra for text in SOURCES.values() for extra in re.findall(r"kornia-tinyvit\[([a-z]+)\]", text)}
    assert named
    assert named <= set(EXTRAS)
    for extra, requirements in EXTRAS.items():
        inner = {
            name
            for each in requirements
            for found in re.findall(r"kornia-tinyvit\[(.*)\]", each)
            for name in found.split(",")
        }
        assert inner <= set(EXTRAS) - {extra}


def imported(tree: ast.Module) -> set[str]:
    """Return the top-level packages that a module imports anywhere."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_imports_are_requirements():
    requirements = [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]
    required = {re.match(r"[\w-]+", each)[0].lower() for each in requirements}
    names = set().union(*(imported(ast.parse(text)) for text in SOURCES.values()))
    foreign = names - sys.stdlib_module_names - {"kornia_tinyvit", "timm"}  # timm is optional, for teachers
    assert not {name for name in foreign if PACKAGES.get(name, name) not in required}


@pytest.fixture(scope="module")
def modules_after_imports() -> list[set[str]]:
    """The top-level modules that are loaded after each of several imports, in one process."""
    code = "import sys\n" + "".join(
        f"import {module}; print(*{{name.split('.')[0] for name in sys.modules}})\n"
        for module in ("kornia_tinyvit", *(f"kornia_tinyvit.{name}" for name in ("training", "distillation", "cli")))
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_optional_packages_are_imported_on_use(modules_after_imports):
    assert not modules_after_imports[-1] & {
        "accelerate", "matplotlib", "onnx", "openvino", "pyarrow", "pycocotools", "ray", "transformers", "yaml",
    }  # fmt: skip


def test_light_import(modules_after_imports):
    modules = modules_after_imports[0]
    assert {"torch", "kornia"} <= modules
    assert not modules & {
        "accelerate", "gradio", "huggingface_hub", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "pyarrow",
        "pycocotools", "rich", "scipy", "timm", "transformers", "typer", "yaml",
    }  # fmt: skip
