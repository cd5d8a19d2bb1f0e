"""What a release consists of: the source distribution, the wheel built from it, and what they say of themselves."""

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
#: What modules are called that packages install under another name, or that come with a package that is asked for.
PACKAGES = {"PIL": "pillow", "yaml": "accelerate", "huggingface_hub": "transformers"}
UNPUBLISHED = {".git", ".venv", "build", "dist", "runs", "demo", "_build"}


def build(what: str, source: Path, out: Path) -> Path:
    """Let setuptools, as it is installed here, build a distribution; nothing is fetched."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{what}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, out], cwd=source, check=True, capture_output=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution of this checkout, unpacked, and the wheel that is built from it."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs setuptools 77, which knows license expressions: pip install -U setuptools")
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


def test_wheel_is_small_and_typed_and_whole(built):
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


def test_source_distribution_can_be_tested(built):
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


def test_no_distribution_names_a_machine(built):
    source, _ = built
    marks = re.compile(rb"/(?:home|root|Users|work|opt)/")
    texts = [
        path for path in source.rglob("*") if path.suffix in (".py", ".md", ".rst", ".txt", ".toml", ".cfg", ".json")
    ]
    assert texts
    assert not [str(path) for path in texts if path.name != Path(__file__).name and marks.search(path.read_bytes())]


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


def test_extras_that_errors_name_exist():
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


def test_what_is_imported_is_asked_for():
    requirements = [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]
    asked = {re.match(r"[\w-]+", each)[0].lower() for each in requirements}
    names = set().union(*(imported(ast.parse(text)) for text in SOURCES.values()))
    foreign = names - sys.stdlib_module_names - {"kornia_tinyvit", "timm"}  # of teachers, by the user's choice
    assert not {name for name in foreign if PACKAGES.get(name, name) not in asked}


@pytest.mark.parametrize("module", ["training", "distillation", "cli"])
def test_optional_packages_are_imported_where_they_are_used(module):
    code = f"import sys, kornia_tinyvit.{module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {
        "accelerate", "matplotlib", "onnx", "openvino", "pyarrow", "pycocotools", "ray", "transformers", "yaml",
    }  # fmt: skip


def test_import_stays_light():
    code = "import sys, kornia_tinyvit; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert {"torch", "kornia"} <= modules
    assert not modules & {
        "accelerate", "gradio", "huggingface_hub", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "pyarrow",
        "pycocotools", "rich", "scipy", "timm", "transformers", "typer", "yaml",
    }  # fmt: skip
