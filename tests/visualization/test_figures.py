import copy

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.images import read_image
from kornia_tinyvit.visualization import (
    demo_augmentations,
    save_figure,
)


@pytest.fixture
def classifier(tiny) -> ImageClassifier:
    return ImageClassifier(tiny).eval()


class TestDemoAugmentations:
    def test_always_change_a_image(self):
        image = read_image(ASSETS / "photos" / "horse.png")[None]
        changed = [view(image) for view in demo_augmentations().values()]
        assert len(changed) == 3
        for number, view in enumerate(changed):
            assert view.shape == image.shape
            for other in [image, *changed[:number]]:
                assert (view - other).abs().mean() > 0.01

    def test_alike_with_a_seed(self):
        image = torch.rand(1, 3, 40, 40)
        results = []
        for _ in range(2):
            torch.manual_seed(0)
            results.append([view(image) for view in demo_augmentations().values()])
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)


class TestSheet:
    @pytest.mark.parametrize("size", [(60, 100), (100, 60), (64, 64), (8, 8), (3, 120), (120, 3)])
    def test_sizes(self, classifier, tmp_path, size):
        path = tmp_path / "new folder" / "sheet.png"
        image = torch.rand(3, *size)
        found = save_figure(path, classifier, image, "A photo")
        expected = classifier.predict(image)[0]
        assert [each.label for each in found] == [each.label for each in expected]
        assert [each.score for each in found] == pytest.approx([each.score for each in expected], rel=1e-3)
        sheet = Image.open(path)
        assert (sheet.format, sheet.mode) == ("PNG", "RGB")
        high = round(232 * min(max(size[0] / size[1], 0.7), 1.5))
        assert sheet.size == (12 + 5 * 244, 48 + 2 * (high + 36))

    def test_shows_the_photo_and_the_stages(self, classifier, tmp_path):
        image = torch.tensor([0.9, 0.1, 0.2]).view(3, 1, 1).expand(3, 60, 60).clone()
        save_figure(tmp_path / "sheet.png", classifier, image, "Red", top_k=2)
        sheet = np.array(Image.open(tmp_path / "sheet.png")).astype(int)
        first = sheet[48 : 48 + 232, 12 : 12 + 232]
        assert np.abs(first - np.array([229.5, 25.5, 51])).max() <= 1
        columns = [sheet[:, 12 + 244 * number : 244 + 244 * number] for number in range(5)]
        for column in columns:
            for row in (column[48:280], column[316:548]):
                assert (row != 255).any()
        assert (sheet[:, :12] == 255).all()

    def test_own_views(self, classifier, tmp_path):
        path = tmp_path / "sheet.png"
        save_figure(path, classifier, torch.rand(3, 40, 40), "Two", views={"same": nn.Identity()}, top_k=3)
        assert Image.open(path).size[0] == 12 + 5 * 244  # the row of stages is the longer one
        views = {str(number): nn.Identity() for number in range(6)}
        save_figure(path, classifier, torch.rand(3, 40, 40), "Many", views=views)
        assert Image.open(path).size[0] == 12 + 8 * 244

    def test_leaves_a_network_in_training_as_it_was(self, classifier, tmp_path):
        image = torch.rand(3, 40, 40)
        torch.manual_seed(0)
        expected = save_figure(tmp_path / "a.png", classifier, image, "")
        state = copy.deepcopy(classifier.state_dict())
        classifier.train()
        torch.manual_seed(0)
        assert save_figure(tmp_path / "b.png", classifier, image, "") == expected
        assert all(module.training for module in classifier.modules())
        for name, tensor in classifier.state_dict().items():
            assert torch.equal(tensor, state[name])
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
