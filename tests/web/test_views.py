"""Results that the web demo shows for a photo."""

import dataclasses
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from kornia_tinyvit import ImageClassifier
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.sam import MobileSAM
from kornia_tinyvit.web.views import (
    AugmentationParams,
    Photo,
    UserPrompts,
    augment,
    compare,
    explain,
    open_photo,
    segment_everything,
    segment_prompts,
    show_features,
)
from tests.sam.test_model import lively

CAT = ASSETS / "photos" / "chelsea.png"  # 451x300


@pytest.fixture
def classifier(tiny) -> ImageClassifier:
    return ImageClassifier(tiny, class_names=["crane", "cat", "crane", "dog", "<b>", "hat", "car"]).eval()


@pytest.fixture(scope="module")
def sam() -> MobileSAM:
    return lively()


@pytest.fixture
def photo() -> Photo:
    return open_photo(CAT)


def gradient(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


class TestOpenPhoto:
    def test_pixels(self):
        assert np.array_equal(open_photo(CAT).image, Image.open(CAT).convert("RGB"))

    @pytest.mark.parametrize(("size", "kept"), [((3000, 1500), (1024, 512)), ((20, 4000), (5, 1024)), ((1, 1), (1, 1))])
    def test_size(self, tmp_path, size, kept):
        gradient(*size).save(tmp_path / "photo.png")
        assert open_photo(tmp_path / "photo.png").image.size == kept

    @pytest.mark.parametrize(
        ("mode", "kind"), [("CMYK", "jpg"), ("I;16", "png"), ("F", "tif"), ("RGBA", "png"), ("LA", "png"), ("P", "gif")]
    )
    def test_kinds(self, tmp_path, mode, kind):
        photo = Image.linear_gradient("L")
        if mode == "I;16":
            photo = Image.fromarray(np.asarray(photo, dtype=np.uint16) * 257)
        if mode == "F":
            photo = Image.fromarray(np.asarray(photo, dtype=np.float32) / 255)
        photo.convert(mode).save(tmp_path / f"photo.{kind}")
        read = np.asarray(open_photo(tmp_path / f"photo.{kind}").image).astype(int)
        expected = np.asarray(Image.linear_gradient("L").convert("RGB")).astype(int)
        assert abs(read - expected).max() <= 2

    def test_unknown_range(self, tmp_path):
        Image.linear_gradient("L").convert("F").save(tmp_path / "photo.tif")
        with pytest.raises(ValueError, match=r"^photo\.tif is not .*got values from 0 to 255\. Divide them by 255"):
            open_photo(tmp_path / "photo.tif")

    def test_first_of_an_animation(self, tmp_path):
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        frames[0].save(tmp_path / "photo.gif", save_all=True, append_images=frames[1:])
        assert open_photo(tmp_path / "photo.gif").image.getpixel((4, 4)) == (255, 0, 0)

    def test_text(self, tmp_path):
        (tmp_path / "notes.png").write_text("no image")
        with pytest.raises(ValueError, match=r"^notes\.png is not an image that can be read") as raised:
            open_photo(tmp_path / "notes.png")
        assert str(tmp_path) not in str(raised.value)

    def test_truncated(self, tmp_path):
        whole = io.BytesIO()
        gradient(400, 300).save(whole, "JPEG")
        (tmp_path / "half.jpg").write_bytes(whole.getvalue()[:1500])
        with pytest.raises(ValueError, match=r"^half\.jpg is not an image that can be read"):
            open_photo(tmp_path / "half.jpg")

    def test_too_many_pixels(self, tmp_path, monkeypatch):
        Image.new("1", (8000, 5001)).save(tmp_path / "large.png")
        monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("was decoded"))
        with pytest.raises(ValueError, match=r"it has 8000x5001 pixels, more than 40000000 in total"):
            open_photo(tmp_path / "large.png")


class TestExplain:
    def test_scores_and_saliency(self, classifier, photo):
        scores, heat = explain(classifier, photo, top_k=3)
        (expected,) = classifier.predict(CAT, top_k=3)
        assert list(scores.values()) == pytest.approx([each.score for each in expected])
        assert heat.size == photo.image.size
        assert np.asarray(heat).std() > 0

    def test_names_of_two_classes(self, classifier, photo):
        scores, _ = explain(classifier, photo, top_k=7)
        assert set(scores) == {"crane (0)", "cat", "crane (2)", "dog", "<b>", "hat", "car"}
        assert sum(scores.values()) == pytest.approx(1)


class TestAugment:
    def test_nothing(self):
        images = torch.rand(1, 3, 20, 30)
        assert augment(images, AugmentationParams()) is images

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("brightness", 0.5),
            ("contrast", 1.5),
            ("saturation", 0.0),
            ("hue", 0.25),
            ("rotation", 20.0),
            ("perspective", -0.4),
            ("blur", 2.0),
            ("noise", 0.1),
        ],
    )
    def test_each(self, name, value):
        """The result differs from the image, is deterministic and stays in [0, 1]."""
        images = torch.rand(1, 3, 20, 30)
        changed = augment(images, AugmentationParams(**{name: value}))
        assert changed.shape == images.shape
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert (changed - images).abs().mean() > 0.01
        torch.manual_seed(7)
        assert torch.equal(augment(images, AugmentationParams(**{name: value})), changed)
        assert name in {each.name for each in dataclasses.fields(AugmentationParams)}

    def test_directions(self):
        """Rotation is counterclockwise; positive perspective shrinks the right edge."""
        images = torch.zeros(1, 3, 21, 21)
        images[..., 10, 18] = 1
        assert augment(images, AugmentationParams(rotation=90.0))[0, 0, 2, 10] > 0.9
        white = torch.ones(1, 3, 20, 30)
        right, left = (augment(white, AugmentationParams(perspective=sign * 0.5))[0, 0, 1] for sign in (1, -1))
        assert (right[-3:].max(), right[:3].min()) == (0, 1)
        assert torch.allclose(left.flip(0), right, atol=1e-4)

    @pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 2)])
    def test_smallest(self, size):
        everything = AugmentationParams(0.5, 1.5, 0.5, 0.1, 10.0, 0.9, 12.0, 0.5)
        assert augment(torch.rand(1, 3, *size), everything).isfinite().all()


class TestCompare:
    def test_scores(self, classifier, photo):
        changed, rows = compare(classifier, photo, AugmentationParams(brightness=0.5), top_k=7)
        scores, _ = explain(classifier, photo, top_k=7)
        darker, _ = explain(classifier, Photo(changed), top_k=7)
        assert {label: before for label, before, _ in rows} == pytest.approx(scores, rel=1e-3)
        assert {label: after for label, _, after in rows} == pytest.approx(darker, rel=2e-2)  # rounded to uint8
        highest = [max(scores) for _, *scores in rows]
        assert highest == sorted(highest, reverse=True)


class TestFeatures:
    def test_stages(self, classifier, photo):
        drawn = show_features(classifier, photo)
        assert [about.split(" cells")[0] for _, about in drawn] == [
            "stage 1: 16 channels of 64 x 97",
            "stage 2: 16 channels of 32 x 49",
            "stage 3: 24 channels of 16 x 25",
            "stage 4: 32 channels of 8 x 13",
        ]
        for image, about in drawn:
            height, width = map(int, re.findall(r"(\d+) x (\d+)", about)[0])
            assert (image.width % width, image.height % height) == (0, 0)
            assert 300 < image.width < 700


class TestUserPrompts:
    def test_box(self):
        prompts = UserPrompts().add_corner(30, 5)
        assert (prompts.corner, prompts.box, prompts.ready) == ((30, 5), None, False)
        prompts = prompts.add_corner(10, 20)
        assert (prompts.corner, prompts.box, prompts.ready) == (None, (10, 5, 30, 20), True)
        assert prompts.add_corner(1, 2) == UserPrompts((), (1, 2), None)

    def test_points(self):
        prompts = UserPrompts().add_point(1, 2, on=False)
        assert not prompts.ready
        prompts = prompts.add_point(3, 4, on=True)
        assert prompts.ready
        assert prompts.points == ((1, 2, 0), (3, 4, 1))

    @pytest.mark.parametrize("second", [(30, 20), (10, 5), (30, 5)])
    def test_empty_box(self, second):
        with pytest.raises(ValueError, match="The box is empty"):
            UserPrompts().add_corner(30, 5).add_corner(*second)


class TestSegment:
    def test_encoded_once(self, sam, photo, monkeypatch):
        calls = []
        embed = sam.embed
        monkeypatch.setattr(sam, "embed", lambda image: calls.append(image) or embed(image))
        segment_prompts(sam, photo, UserPrompts(((200, 150, 1),)))
        segment_prompts(sam, photo, UserPrompts(box=(10, 10, 300, 200)))
        segment_everything(sam, photo, 2)
        assert calls == [photo.image]

    def test_mask(self, sam, photo):
        overlay, message = segment_prompts(sam, photo, UserPrompts(((200, 150, 1), (20, 280, 0))))
        points, labels = torch.tensor([[[200.0, 150.0], [20.0, 280.0]]]), torch.tensor([[1, 0]])
        (found,) = sam.predict_masks(sam.embed(CAT), points, labels, multimask_output=False)
        fraction = found.masks().float().mean().item()
        assert message == f"The mask covers {fraction:.1%} of the photo; predicted IoU {found.scores.item():.2f}."
        changed = (np.asarray(overlay) != np.asarray(photo.image)).any(2)
        assert changed.mean() == pytest.approx(fraction, abs=0.02)

    def test_no_prompts(self, sam, photo):
        with pytest.raises(ValueError, match="There are no prompts"):
            segment_prompts(sam, photo, UserPrompts())

    def test_everything(self, sam, photo, monkeypatch):
        whole = MobileSAM.generate_masks
        easy = {"pred_iou_thresh": -1e9, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
        monkeypatch.setattr(MobileSAM, "generate_masks", lambda self, image, **more: whole(self, image, **easy, **more))
        overlay, message = segment_everything(sam, photo, 2)
        assert re.fullmatch(r"Found \d+ masks at 4 points\.", message)
        assert (np.asarray(overlay) != np.asarray(photo.image)).any()
