"""What importing the package does, and does not do."""

import subprocess
import sys

import pytest

from kornia_tinyvit.checkpoints.catalog import ASSETS


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_the_package_does_not_import_transformers():
    done = run(
        "import sys, kornia_tinyvit, kornia_tinyvit.cli, kornia_tinyvit.checkpoints.hub\n"
        "print(sorted({'transformers', 'peft', 'huggingface_hub'} & sys.modules.keys()))"
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "program", ["import kornia_tinyvit.huggingface", "from kornia_tinyvit.cli import main; main()"]
)
def test_missing_extra(program):
    """Without transformers there is one line, which says what to install."""
    done = run(
        "import sys\nsys.modules['transformers'] = None\nsys.argv = ['kornia-tinyvit', 'convert', 'never-made']\n"
        + program
    )
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("kornia_tinyvit.huggingface needs transformers: pip install 'kornia-tinyvit[hf]'.")
    )


def test_nothing_needs_torchvision_or_timm():
    pytest.importorskip("transformers")
    done = run(
        "import sys\nfor name in ('torchvision', 'timm'): sys.modules[name] = None\n"
        "import kornia_tinyvit.huggingface as hf\n"
        f"print(hf.TinyVitImageProcessor(size=64)({str(ASSETS / 'photos' / 'horse.png')!r})['pixel_values'].shape)"
    )
    assert done.stdout.strip() == "torch.Size([1, 3, 64, 64])", done.stderr


def test_classification_pipeline(tmp_path):
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    from kornia_tinyvit import ImageClassifier
    from kornia_tinyvit.huggingface import save_hub_folder

    save_hub_folder(tmp_path, "cifar10", "1m")
    photo = ASSETS / "photos" / "horse.png"
    (wanted,) = ImageClassifier.from_config("1m", pretrained="cifar10").predict(photo, top_k=3)
    classify = transformers.pipeline("image-classification", model=str(tmp_path))
    for given in (str(photo), Image.open(photo)):
        found = classify(given, top_k=3)
        assert [each["label"] for each in found] == [each.label for each in wanted]
        assert [each["score"] for each in found] == pytest.approx([each.score for each in wanted], rel=1e-4)
    assert found[0]["label"] == "horse"


def test_feature_pipeline(tmp_path):
    transformers = pytest.importorskip("transformers")
    from kornia_tinyvit.huggingface import save_hub_folder

    save_hub_folder(tmp_path, "cifar10", "1m")
    extract = transformers.pipeline("image-feature-extraction", model=str(tmp_path), pool=True)
    assert len(extract(str(ASSETS / "photos" / "horse.png"))[0]) == 160
