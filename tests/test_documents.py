"""The code that a reader would copy runs: README.md and every Python block of the documentation."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kornia_tinyvit.checkpoints.catalog import ASSETS

ROOT = Path(__file__).parents[1]
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


def test_table_of_the_recipes_is_current():
    written = (ROOT / "docs" / "guides" / "outputs" / "recipes.csv").read_text(encoding="utf-8")
    assert written == runpy.run_path(str(ROOT / "docs" / "record_outputs.py"))["recipes_table"]()
