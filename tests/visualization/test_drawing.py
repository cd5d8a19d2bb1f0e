import errno

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_lab
from kornia.image import image_to_tensor
from PIL import Image, ImageDraw

from kornia_tinyvit.data.segmentation import IGNORED
from kornia_tinyvit.detection import Detection
from kornia_tinyvit.ops import encode_rle
from kornia_tinyvit.visualization import (
    distinct_colors,
    draw_class_map,
    draw_detections,
    draw_overlay,
    save_image,
    save_rows,
)
from kornia_tinyvit.visualization.drawing import OPACITY

GREY = torch.full((3, 60, 80), 128, dtype=torch.uint8)


def pixels_of(*arguments, **keywords) -> torch.Tensor:
    return image_to_tensor(np.array(draw_overlay(*arguments, **keywords)))


def square(top: int, left: int, side: int) -> torch.Tensor:
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


class TestColors:
    def test_distinct(self):
        colors = distinct_colors(20)
        assert colors.shape == (20, 3)
        assert ((colors >= 0) & (colors <= 1)).all()
        lab = rgb_to_lab(colors.T[..., None])[..., 0].T
        assert (torch.cdist(lab, lab) + 100 * torch.eye(20)).min() > 30
        assert torch.equal(distinct_colors(3), colors[:3])
        assert distinct_colors(0).shape == (0, 3)
        assert len(distinct_colors(300).unique(dim=0)) == 256


class TestMasks:
    def test_tint_and_contour(self):
        drawn = pixels_of(GREY, [square(10, 20, 15)])
        color = (distinct_colors(1)[0] * 255).round()
        tint = torch.lerp(torch.full((3,), 128.0), distinct_colors(1)[0] * 255, OPACITY).round()
        for row, column in ((10, 20), (10, 34), (24, 27), (17, 20)):
            assert torch.equal(drawn[:, row, column].float(), color)
        assert torch.equal(drawn[:, 17, 27].float(), tint)
        outside = ~square(10, 20, 15)
        assert (drawn[:, outside] == 128).all()

    def test_contour_of_a_large_image(self):
        """Its width grows with the image; it is what lies so near to the outside, across, down or diagonally."""
        mask = torch.zeros(40, 2000, dtype=torch.bool)
        mask[5:35, 100:1900] = mask[0:20, 300:320] = True
        mask[18, 900] = False
        drawn = pixels_of(torch.full((3, 40, 2000), 128, dtype=torch.uint8), [mask])
        near = F.pad(~mask, (4, 4, 4, 4), value=True).unfold(0, 9, 1).unfold(1, 9, 1).flatten(2).any(2)
        color = (distinct_colors(1)[0] * 255).round()
        assert torch.equal((drawn.float() == color[:, None, None]).all(0), mask & near)

    def test_forms(self):
        """Arrays, integers and run-length codes are drawn as bool tensors are."""
        mask = square(10, 20, 15)
        wanted = pixels_of(GREY, [mask])
        codes = [encode_rle(mask, compressed=compressed) for compressed in (True, False)]
        levels = [mask.to(torch.uint8), 255 * mask.to(torch.uint8), mask.long(), mask.to(torch.uint8).numpy()]
        for form in (mask.numpy(), *levels, 255 * levels[-1], mask.numpy()[::-1].copy()[::-1], *codes):
            assert torch.equal(pixels_of(GREY, [form]), wanted)

    def test_generated_masks(self):
        """What MobileSAM.generate_masks returns, in every output mode."""
        found = [square(10, 20, 15).numpy(), encode_rle(square(5, 5, 9))]
        assert torch.equal(pixels_of(GREY, found), pixels_of(GREY, [square(10, 20, 15), square(5, 5, 9)]))

    def test_logits(self):
        with pytest.raises(TypeError, match=r"A mask must be bool or integer; got float32\. Compare logits"):
            draw_overlay(GREY, [torch.zeros(60, 80)])

    def test_later_ones_lie_on_top(self):
        drawn = pixels_of(GREY, [square(0, 0, 40), square(10, 10, 9)])
        assert torch.equal(drawn[:, 10, 10].float(), (distinct_colors(2)[1] * 255).round())

    def test_nothing(self):
        assert torch.equal(pixels_of(GREY, [torch.zeros(60, 80, dtype=torch.bool)]), GREY)
        assert torch.equal(pixels_of(GREY, []), GREY)

    def test_whole_image(self):
        drawn = pixels_of(GREY, [torch.ones(60, 80, dtype=torch.bool)])
        assert (drawn != 128).any(0).all()

    def test_the_photo_stays(self):
        photo = torch.rand(3, 60, 80)
        before = photo.clone()
        drawn = pixels_of(photo, [])
        draw_overlay(photo, [square(5, 5, 5)])
        assert torch.equal(photo, before)
        assert torch.equal(drawn, (photo * 255).round().byte())

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"A mask must be \(60, 80\); got \(60, 81\)"):
            draw_overlay(GREY, [torch.zeros(60, 81, dtype=torch.bool)])
        with pytest.raises(ValueError, match=r"An image must have .* channels; got the shape .* \(2, 60, 80\)"):
            draw_overlay(GREY[:2], [])


class TestPrompts:
    def test_points(self):
        places = torch.tensor([[20.0, 30.0], [60.0, 10.0]])
        drawn = pixels_of(GREY, [], points=places, labels=torch.tensor([1, 0]))
        green, red = drawn[:, 30, 20].tolist(), drawn[:, 10, 60].tolist()
        assert green[1] > max(green[0], green[2])
        assert red[0] > max(red[1], red[2])
        assert (drawn != 128).any(0).sum() < 200
        unlabeled = pixels_of(GREY, [], points=places)
        assert torch.equal(unlabeled[:, 10, 60], drawn[:, 30, 20])

    @pytest.mark.parametrize("box", [[10.0, 20.0, 50.0, 40.0], [10.0, 20.0, 10.5, 20.5], [-20.0, -20.0, 200.0, 40.0]])
    def test_boxes(self, box):
        drawn = pixels_of(GREY, [], boxes=torch.tensor([box]))
        changed = (drawn != 128).any(0)
        assert changed.any()
        if box[2] == 50.0:
            assert drawn[:, 20, 30].tolist() == [255, 255, 255]
            assert not changed[30, 30]


class TestClassMaps:
    MAP = torch.tensor([[0, 2, 2, 2], [0, 2, 2, IGNORED]])
    NAMES = ("sky", "road", "car")

    def test_colors(self):
        """A class has the same color in every map; ignored pixels are black."""
        drawn = np.array(draw_class_map(self.MAP))
        colors = (255 * distinct_colors(3)).int().numpy()
        assert drawn.shape == (2, 4, 3)
        assert (drawn[:, 0] == colors[0]).all()
        assert (drawn[:, 1:3] == colors[2]).all()
        assert not drawn[1, 3].any()
        for form in (self.MAP.numpy(), self.MAP.short(), torch.where(self.MAP < 0, -1, self.MAP).to(torch.int8)):
            assert np.array_equal(np.array(draw_class_map(form)), drawn)
        assert np.array_equal(np.array(draw_class_map(np.uint8([[2]]))), drawn[:1, 1:2])

    def test_over_an_image(self):
        classes = torch.zeros(60, 80, dtype=torch.int64)
        classes[:, 40:] = 1
        classes[50:] = IGNORED
        drawn = image_to_tensor(np.array(draw_class_map(classes, GREY, opacity=0.25))).float()
        for column, color in enumerate(distinct_colors(2)):
            wanted = torch.full((3,), 128.0).lerp(color * 255, 0.25)
            assert (drawn[:, 20, 40 * column] - wanted).abs().max() <= 1
        assert not drawn[:, 50:].any()

    def test_legend(self):
        plain, drawn = draw_class_map(self.MAP), draw_class_map(self.MAP, class_names=self.NAMES)
        assert drawn.width > plain.width
        assert drawn.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
        shown = {color for _, color in drawn.crop((plain.width, 0, *drawn.size)).getcolors(2**16)}
        sky, road, car = (tuple((255 * color).int().tolist()) for color in distinct_colors(3))
        assert {sky, car, (0, 0, 0)} < shown
        assert road not in shown

    def test_order_and_shares_of_the_legend(self, monkeypatch):
        texts = []
        monkeypatch.setattr(
            ImageDraw.ImageDraw, "text", lambda self, place, text, **_: texts.append((place[1], place[0], text))
        )
        draw_class_map(self.MAP, class_names=self.NAMES)
        assert [text for *_, text in sorted(texts)] == ["car", "62.5 %", "sky", "25.0 %", "ignored", "12.5 %"]

    def test_errors(self):
        with pytest.raises(TypeError, match=r"must hold integers; got float32\. Give the argmax"):
            draw_class_map(torch.zeros(2, 2))
        with pytest.raises(ValueError, match=r"must be \(H, W\); got \(1, 2, 4\)"):
            draw_class_map(self.MAP[None])
        with pytest.raises(ValueError, match=r"must have the image's 60x80; got \(2, 4\)"):
            draw_class_map(self.MAP, GREY)
        with pytest.raises(ValueError, match="holds the class 2, but there are 2 names"):
            draw_class_map(self.MAP, class_names=("sky", "road"))


class TestImages:
    def test_forms(self, tmp_path):
        """Paths, PIL images and arrays; see also tests/test_images.py."""
        levels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / "photo.png")
        found = [Detection("cat", 0, 0.9, (10.0, 10.0, 50.0, 40.0))]
        tensor = torch.from_numpy(levels).movedim(2, 0)
        wanted = pixels_of(tensor, [square(5, 5, 9)]), np.array(draw_detections(tensor, found))
        for image in (tmp_path / "photo.png", Image.fromarray(levels), levels, levels / 255):
            assert torch.equal(pixels_of(image, [square(5, 5, 9)]), wanted[0])
            assert np.array_equal(np.array(draw_detections(image, found)), wanted[1])
        with pytest.raises(ValueError, match="Divide them by 255"):
            draw_overlay(levels.astype(np.float32), [])


class TestSaveImage:
    @pytest.mark.parametrize(("name", "form"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("a", "PNG")])
    def test_format(self, tmp_path, name, form):
        path = tmp_path / "new" / name
        save_image(path, Image.new("RGB", (5, 2), "red"))
        with Image.open(path) as written:
            assert (written.format, written.size) == (form, (5, 2))

    def test_unknown_format(self, tmp_path):
        (tmp_path / "a.txt").write_text("the old file")
        with pytest.raises(ValueError, match=r"unknown file extension: \.txt"):
            save_image(tmp_path / "a.txt", Image.new("RGB", (5, 2)))
        assert (tmp_path / "a.txt").read_text() == "the old file"

    def test_failing_write(self, tmp_path, monkeypatch):
        def fail(image, path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", fail)
        with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/a.png'"):
            save_image(tmp_path / "a.png", Image.new("RGB", (5, 2)))
        assert list(tmp_path.iterdir()) == []


def test_rows(tmp_path):
    path = tmp_path / "new" / "rows.png"
    save_rows(path, [Image.new("RGB", (5, 2), "red"), Image.new("RGB", (5, 3), "blue")])
    written = Image.open(path)
    assert written.size == (5, 5)
    assert [written.getpixel((4, row)) for row in (1, 2, 4)] == [(255, 0, 0), (0, 0, 255), (0, 0, 255)]
