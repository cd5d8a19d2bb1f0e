"""Imports, registration with transformers, and its pipelines."""

import subprocess
import sys

import pytest

from kornia_tinyvit.checkpoints.catalog import ASSETS

#: All checks of imports in one process. Each prints a line.
PROGRAM = f"""
import sys
import kornia_tinyvit, kornia_tinyvit.cli, kornia_tinyvit.checkpoints.hub
print(sorted({{'transformers', 'peft', 'huggingface_hub'}} & sys.modules.keys()))

sys.modules['transformers'] = None
try:
    import kornia_tinyvit.huggingface
except ImportError as error:
    print(error)
sys.argv = ['kornia-tinyvit', 'convert', '--out', 'never-made']
try:
    kornia_tinyvit.cli.main()
except SystemExit as exit:
    print(exit.code)

del sys.modules['transformers']
for name in ('torchvision', 'timm'):
    sys.modules[name] = None
import kornia_tinyvit.huggingface as hf
print(hf.TinyVitImageProcessor(size=64)({str(ASSETS / "photos" / "horse.png")!r})['pixel_values'].shape)
"""
MISSING = "kornia_tinyvit.huggingface needs transformers: pip install 'kornia-tinyvit[hf]'."


@pytest.fixture(scope="module")
def imports() -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)


def test_package_does_not_import_transformers(imports):
    assert imports.stdout.splitlines()[0] == "[]", imports.stderr


def test_missing_extra(imports):
    """Without transformers the error states what to install, in Python and on the command line."""
    assert imports.stdout.splitlines()[1:3] == [MISSING, "1"], imports.stderr
    assert any(line.endswith(MISSING) for line in imports.stderr.splitlines())


def test_without_torchvision_and_timm(imports):
    pytest.importorskip("transformers")
    assert imports.stdout.splitlines()[3:] == ["torch.Size([1, 3, 64, 64])"], imports.stderr
    assert imports.returncode == 0


def test_classification_pipeline(tmp_path):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    from kornia_tinyvit import ImageClassifier
    from kornia_tinyvit.huggingface import save_hub_folder

    save_hub_folder(tmp_path, "cifar10", "1m")
    photo = ASSETS / "photos" / "horse.png"
    (expected,) = ImageClassifier.from_config("1m", pretrained="cifar10").predict(photo, top_k=3)
    classify = transformers.pipeline("image-classification", model=str(tmp_path))
    for given in (str(photo), Image.open(photo)):
        found = classify(given, top_k=3)
        assert [each["label"] for each in found] == [each.label for each in expected]
        assert [each["score"] for each in found] == pytest.approx([each.score for each in expected], rel=1e-4)
    assert found[0]["label"] == "horse"


def test_feature_pipeline(tmp_path):
    transformers = pytest.importorskip("transformers")
    from kornia_tinyvit.huggingface import save_hub_folder

    save_hub_folder(tmp_path, "cifar10", "1m")
    extract = transformers.pipeline("image-feature-extraction", model=str(tmp_path), pool=True)
    assert len(extract(str(ASSETS / "photos" / "horse.png"))[0]) == 160
