import pytest
import torch
from PIL import Image

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.deploy.benchmark import read_images


class TestReadImages:
    @pytest.fixture
    def folder(self, tmp_path):
        for number in range(8):
            path = tmp_path / "data" / f"class {6 - number % 2}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (70, 80), (30 * number, 0, 0)).save(path)
        return tmp_path / "data"

    def test_calibration_and_evaluation_are_disjoint(self, tiny, folder):
        classifier = ImageClassifier(tiny)
        found = read_images(classifier, folder, 3)
        assert (len(found.calibration), len(found.images), len(found.labels)) == (4, 3, 3)
        shades = torch.cat([found.calibration, found.images])[:, 0, 32, 32]
        assert len(shades.unique()) == 7
        for image, label in zip(found.images, found.labels.tolist(), strict=True):
            number = round(float(image[0, 32, 32] * 0.229 + 0.485) * 255 / 30)
            assert label == 6 - number % 2
        again = read_images(classifier, folder, 3)
        assert torch.equal(again.images, found.images)

    def test_errors(self, tiny, folder):
        classifier = ImageClassifier(tiny)
        (folder / "unicorn").mkdir()
        Image.new("RGB", (70, 80)).save(folder / "unicorn" / "0.png")
        with pytest.raises(ValueError, match="The data has the classes unicorn, but the network has"):
            read_images(classifier, folder, 3)
        with pytest.raises(FileNotFoundError):
            read_images(classifier, folder / "gone", 3)
