import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kornia_tinyvit.ops.rle import decode_rle
from kornia_tinyvit.sam import ImageEmbedding, MobileSAM
from kornia_tinyvit.sam import generator as automatic
from kornia_tinyvit.sam.embedding import Geometry
from kornia_tinyvit.sam.generator import Mask, MaskGenerator
from tests.sam.reference_network import SETTINGS, build_network, draw_photo

RECORDED = json.loads((Path(__file__).parent / "data" / "segment_anything.json").read_text())
WHOLE = (0, 0, 640, 480)
QUARTERS = [(0, 0, 402, 322), (0, 159, 402, 480), (239, 0, 640, 322), (239, 159, 640, 480)]
SIXTEENTHS = [
    (left, top, right, bottom)
    for left, right in ((0, 221), (140, 361), (280, 501), (420, 640))
    for top, bottom in ((0, 181), (100, 281), (200, 381), (300, 480))
]
FEW = {"points_per_side": 2, "pred_iou_thresh": 0, "stability_score_thresh": 0}


@pytest.fixture(scope="module")
def sam():
    return build_network()


@pytest.fixture(scope="module")
def photo():
    return draw_photo()


def iou(one, other):
    return (one & other).sum() / (one | other).sum() if one.any() or other.any() else 1


class TestParity:
    """The masks that segment-anything 1.0 found, recorded by ``data/record_masks.py``."""

    @pytest.mark.parametrize("name", SETTINGS)
    def test_segment_anything(self, sam, photo, name):
        found, expected = sam.generate_masks(photo, **SETTINGS[name]), RECORDED[name]
        assert len(found) == len(expected) > 5
        identical = 0
        for mask, record in zip(found, expected, strict=True):
            recorded = decode_rle(record["segmentation"])
            assert iou(mask.segmentation, recorded) >= 0.99
            identical += np.array_equal(mask.segmentation, recorded)
            assert mask.bbox == pytest.approx(record["bbox"], abs=1)
            assert mask.area == pytest.approx(record["area"], rel=0.01)
            assert mask.crop_box == record["crop_box"]
            assert mask.predicted_iou == pytest.approx(record["predicted_iou"], abs=1e-3)
            assert mask.stability_score == pytest.approx(record["stability_score"], abs=1e-2, nan_ok=True)
            np.testing.assert_allclose(mask.point_coords, record["point_coords"], atol=1e-9)
        assert identical >= 0.95 * len(expected)

    def test_arguments(self):
        """Those of segment-anything 1.0's ``SamAutomaticMaskGenerator.__init__``, in its order, with its defaults."""
        theirs = {
            "points_per_side": 32,
            "points_per_batch": 64,
            "pred_iou_thresh": 0.88,
            "stability_score_thresh": 0.95,
            "stability_score_offset": 1.0,
            "box_nms_thresh": 0.7,
            "crop_n_layers": 0,
            "crop_nms_thresh": 0.7,
            "crop_overlap_ratio": 512 / 1500,
            "crop_n_points_downscale_factor": 1,
            "point_grids": None,
            "min_mask_region_area": 0,
            "output_mode": "binary_mask",
        }
        ours = list(inspect.signature(MaskGenerator).parameters.values())
        assert [(each.name, each.default) for each in ours[: len(theirs)]] == list(theirs.items())

    def test_recorded_settings_differ(self):
        """Crops and the removal of regions change the recorded masks."""
        assert len({tuple(record["crop_box"]) for record in RECORDED["crops"]}) > 1
        plain = {record["segmentation"]["counts"] for record in RECORDED["grid"]}
        assert not plain.issuperset(record["segmentation"]["counts"] for record in RECORDED["regions"])


class TestOutput:
    def test_modes(self, sam, photo):
        arrays, runs, texts = (
            sam.generate_masks(photo, **FEW, output_mode=mode)
            for mode in ("binary_mask", "uncompressed_rle", "coco_rle")
        )
        assert arrays
        for array, run, text in zip(arrays, runs, texts, strict=True):
            assert isinstance(array, Mask)
            assert array.segmentation.dtype == bool
            assert array.segmentation.shape == photo.shape[:2]
            np.testing.assert_array_equal(array.segmentation, decode_rle(run.segmentation))
            np.testing.assert_array_equal(array.segmentation, decode_rle(text.segmentation))
            assert isinstance(run.segmentation["counts"], list)
            assert isinstance(text.segmentation["counts"], str)
            json.dumps([text.segmentation, text.bbox, text.point_coords, text.crop_box, text.area])
            assert array.area == array.segmentation.sum()
            rows, columns = np.nonzero(array.segmentation)
            box = [columns.min(), rows.min(), np.ptp(columns), np.ptp(rows)] if len(rows) else [0, 0, 0, 0]
            assert array.bbox == box

    def test_input_types(self, sam, photo, tmp_path):
        path = tmp_path / "photo.png"
        Image.fromarray(photo).save(path)
        expected = sam.generate_masks(photo, **FEW, output_mode="coco_rle")
        for form in (path, str(path), Image.fromarray(photo), Image.fromarray(photo).convert("RGBA")):
            found = sam.generate_masks(form, **FEW, output_mode="coco_rle")
            assert [mask.segmentation for mask in found] == [mask.segmentation for mask in expected]
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees clockwise
        turned = tmp_path / "turned.png"
        Image.fromarray(photo).transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
        assert [m.segmentation for m in sam.generate_masks(turned, **FEW, output_mode="coco_rle")] == [
            mask.segmentation for mask in expected
        ]
        tensor = torch.from_numpy(photo).movedim(-1, 0) / 255  # resized in floating point, not in uint8
        assert sam.generate_masks(tensor, **FEW)

    @pytest.mark.parametrize("points_per_batch", [1, 5, 1000])
    def test_batches_do_not_matter(self, sam, photo, points_per_batch, monkeypatch):
        monkeypatch.setattr(automatic, "CPU_CHUNK", 1000)
        monkeypatch.setattr(automatic, "PIXELS", points_per_batch)
        expected = sam.generate_masks(photo, **FEW, output_mode="coco_rle")
        found = sam.generate_masks(photo, **FEW, output_mode="coco_rle", points_per_batch=points_per_batch)
        assert [mask.area for mask in found] == pytest.approx([mask.area for mask in expected], abs=2)

    def test_point_grids(self, sam, photo):
        grid = automatic._grid(2).numpy()
        expected = sam.generate_masks(photo, **FEW, output_mode="coco_rle")
        found = sam.generate_masks(
            photo, **{**FEW, "points_per_side": None}, point_grids=[grid], output_mode="coco_rle"
        )
        assert [mask.segmentation for mask in found] == [mask.segmentation for mask in expected]

    def test_max_area(self, sam, photo):
        every = FEW | {"box_nms_thresh": 1.0}
        masks = sam.generate_masks(photo, **every)
        limit = sorted(mask.area for mask in masks)[len(masks) // 2]
        kept = sam.generate_masks(photo, **every, max_area=limit / photo[..., 0].size)
        assert [mask.bbox for mask in kept] == [mask.bbox for mask in masks if mask.area <= limit]
        assert max(mask.area for mask in kept) == limit < max(mask.area for mask in masks)

    def test_large_masks_suppress_none(self, sam, photo):
        """Masks above ``max_area`` are removed before non-maximum suppression."""
        every = FEW | {"box_nms_thresh": 0.0}
        (first, *_) = sam.generate_masks(photo, **every)
        smaller = sam.generate_masks(photo, **every, max_area=(first.area - 1) / photo[..., 0].size)
        assert smaller
        assert all(mask.area < first.area for mask in smaller)

    def test_training_mode_is_unchanged(self, sam, photo):
        expected = sam.generate_masks(photo, **FEW, output_mode="coco_rle")
        sam.train()
        found = sam.generate_masks(photo, **FEW, output_mode="coco_rle")
        assert sam.training
        assert all(module.training for module in sam.modules())
        sam.eval()
        assert [mask.segmentation for mask in found] == [mask.segmentation for mask in expected]

    @pytest.mark.parametrize("size", [(1, 40), (40, 1), (3, 500), (17, 16), (40, 12000)])
    @pytest.mark.parametrize("layers", [0, 1])
    def test_thin_photos(self, sam, size, layers):
        photo = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        for mask in sam.generate_masks(photo, **FEW, crop_n_layers=layers):
            assert mask.segmentation.shape == size

    def test_gray(self, sam, photo, tmp_path):
        gray = Image.fromarray(photo).convert("L")
        gray.save(tmp_path / "gray.png")
        expected = sam.generate_masks(np.repeat(np.array(gray)[..., None], 3, 2), **FEW, output_mode="coco_rle")
        for form in (gray, tmp_path / "gray.png"):
            found = sam.generate_masks(form, **FEW, output_mode="coco_rle")
            assert [mask.segmentation for mask in found] == [mask.segmentation for mask in expected]

    def test_nothing_found(self, sam, photo):
        assert sam.generate_masks(photo, points_per_side=2, pred_iou_thresh=1e6, crop_n_layers=1) == []
        assert sam.generate_masks(photo, points_per_side=2, pred_iou_thresh=1e6, min_mask_region_area=9) == []

    def test_bfloat16(self, sam, photo):
        exact = sam.generate_masks(photo, **SETTINGS["everything"])
        rough = sam.generate_masks(photo, **SETTINGS["everything"], dtype=torch.bfloat16)
        assert len(rough) == len(exact)
        exact.sort(key=lambda mask: (mask.point_coords, mask.predicted_iou))
        rough.sort(key=lambda mask: (mask.point_coords, mask.predicted_iou))
        overlaps = [iou(a.segmentation, b.segmentation) for a, b in zip(exact, rough, strict=True)]
        assert 0.8 < np.median(overlaps) < 1


def overlaps(found, expected):
    """Return the IoU of masks found in two ways, in the same order."""
    return [iou(a.segmentation, b.segmentation) for a, b in zip(found, expected, strict=True)]


class TestSeveralPhotos:
    @pytest.fixture
    def photos(self, photo):
        return [photo, photo[:90, 20:], photo[::-1, ::2].copy()]

    @pytest.mark.parametrize("batch_size", [1, 2, 9])
    def test_same_as_single_images(self, sam, photos, batch_size, monkeypatch):
        expected = [sam.generate_masks(photo, **FEW) for photo in photos]
        seen = []
        encoder = type(sam.image_encoder).forward
        monkeypatch.setattr(type(sam.image_encoder), "forward", lambda self, x: seen.append(len(x)) or encoder(self, x))
        found = sam.generate_masks(photos, **FEW, batch_size=batch_size)
        assert seen == {1: [1, 1, 1], 2: [2, 1], 9: [3]}[batch_size]
        for masks, alone, photo in zip(found, expected, photos, strict=True):
            assert masks[0].segmentation.shape == photo.shape[:2]
            assert min(overlaps(masks, alone)) > 0.99

    def test_batches(self, sam, photo):
        """Arrays and tensors with a batch dimension."""
        (alone,) = sam.generate_masks([photo], **FEW)
        for masks in sam.generate_masks(np.stack([photo, photo]), **FEW):
            assert min(overlaps(masks, alone)) > 0.99
        tensor = torch.from_numpy(photo).movedim(-1, 0)[None] / 255
        (found,) = sam.generate_masks(tensor, **FEW)
        assert min(overlaps(found, sam.generate_masks(tensor[0], **FEW))) == 1

    def test_none(self, sam):
        assert sam.generate_masks([]) == sam.generate_masks(torch.zeros(0, 3, 9, 9)) == []

    def test_crops(self, sam, photos):
        settings = {**FEW, "points_per_side": 1, "crop_n_layers": 1, "output_mode": "coco_rle"}
        found = sam.generate_masks(photos[:2], **settings)
        for masks, photo in zip(found, photos, strict=False):
            alone = sam.generate_masks(photo, **settings)
            assert [mask.crop_box for mask in masks] == [mask.crop_box for mask in alone]

    def test_invalid_image(self, sam, photo):
        with pytest.raises(ValueError, match=r"3 \(RGB\) or 4 \(RGBA\) channels"):
            sam.generate_masks([photo, photo[..., :2]], **FEW)
        with pytest.raises(TypeError, match="got int"):
            sam.generate_masks([photo, 3], **FEW)


class TestEmbedding:
    def test_same_masks_without_the_encoder(self, sam, photo, tmp_path, monkeypatch):
        images = [Image.fromarray(photo), Image.fromarray(photo[:90])]
        expected = [sam.generate_masks(image, **FEW) for image in images]
        path = sam.embed(images, batch_size=1).save(tmp_path / "photos.safetensors")
        monkeypatch.setattr(type(sam.image_encoder), "forward", None)  # must not be called
        for masks, alone in zip(sam.generate_masks(ImageEmbedding.load(path), **FEW), expected, strict=True):
            assert [mask.bbox for mask in masks] == [mask.bbox for mask in alone]
            assert min(overlaps(masks, alone)) == 1

    def test_of_the_prompter(self, sam, photo):
        prompter = sam.prompter()
        prompter.set_image(torch.from_numpy(photo).movedim(-1, 0) / 255)
        (masks,) = sam.generate_masks(prompter.embedding(), **FEW)
        assert masks[0].segmentation.shape == photo.shape[:2]

    def test_errors(self, sam, photo):
        embedding = sam.embed(Image.fromarray(photo))
        with pytest.raises(
            ValueError, match="crop_n_layers=1 needs the pixels of the image, which an embedding does not contain"
        ):
            sam.generate_masks(embedding, **FEW, crop_n_layers=1)
        with pytest.raises(ValueError, match="encoder with other weights"):
            sam.generate_masks(dataclasses.replace(embedding, encoder="others"), **FEW)
        small = MobileSAM.from_config("1m", img_size=128).eval()
        with pytest.raises(ValueError, match="this network has"):
            small.generate_masks(embedding, **FEW)


class TestMemory:
    @pytest.mark.parametrize("room", [0, 20_000])
    def test_encoded_early(self, sam, photo, monkeypatch, room):
        """Candidates beyond a number of bytes are kept encoded; the result is the same."""
        settings = {**FEW, "box_nms_thresh": 0.95, "crop_n_layers": 1, "output_mode": "coco_rle"}
        expected = sam.generate_masks(photo, **settings)
        kept, blocks = [], {}
        encode = automatic._Crop._encode

        def spy(self, mask):
            kept.append(isinstance(mask, torch.Tensor))
            if kept[-1]:
                blocks.setdefault(self.box, set()).add(mask.untyped_storage().data_ptr())
            return encode(self, mask)

        monkeypatch.setattr(automatic, "LOGITS", room)
        monkeypatch.setattr(automatic, "CPU_CHUNK", 2)
        monkeypatch.setattr(automatic._Crop, "_encode", spy)
        found = sam.generate_masks(photo, **settings)
        assert any(kept) == (room > 0)
        assert not all(kept)
        assert all(len(block) == 1 for block in blocks.values())  # a single allocation
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert iou(decode_rle(one.segmentation), decode_rle(other.segmentation)) > 0.99
            assert one.crop_box == other.crop_box


class TestSavings:
    def test_upscales_only_what_passes(self, sam, photo, monkeypatch):
        decoded, chosen = [], []
        prompt, upscale = automatic.FoldedMaskDecoder.prompt, automatic.FoldedMaskDecoder.upscale

        def count_prompts(self, image, sparse):
            decoded.append(len(sparse))
            return prompt(self, image, sparse)

        def count_upscaled(self, prompted, prompts, cells):
            chosen.append(len(prompts))
            assert cells == (13, 16)  # of 16x16: the photo, 150x200, covers 12 rows, and its last one is interpolated
            return upscale(self, prompted, prompts, cells)

        monkeypatch.setattr(automatic.FoldedMaskDecoder, "prompt", count_prompts)
        monkeypatch.setattr(automatic.FoldedMaskDecoder, "upscale", count_upscaled)
        masks = sam.generate_masks(photo, **{**SETTINGS["grid"], "pred_iou_thresh": 4})
        assert sum(decoded) == 64
        assert len(masks) / 3 <= sum(chosen) < 64


class TestUpsample:
    @pytest.mark.parametrize(
        "size", [(150, 200), (200, 150), (1024, 1024), (37, 64), (900, 1700), (1, 300), (256, 256)]
    )
    def test_two_steps(self, size):
        geometry = Geometry.fit(size, (256, 256))
        enlarge = automatic._Upsample(geometry, (64, 64), torch.device("cpu"))
        logits = 10 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
        height, width = geometry.input_size
        square = F.interpolate(logits[None], (256, 256), mode="bilinear", align_corners=False)
        expected = F.interpolate(square[..., :height, :width], size, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(enlarge(logits), expected, atol=2e-5, rtol=0)
        rows, columns = (4 * cells for cells in enlarge.cells)
        torch.testing.assert_close(enlarge(logits[:, :rows, :columns]), enlarge(logits))
        assert max(rows - 4 - height / 4, columns - 4 - width / 4) <= 1  # one row and column beyond the photo


class TestSteps:
    def test_crop_boxes(self):
        """The numbers of segment-anything's ``generate_crop_boxes((480, 640), 2, 512 / 1500)``."""
        crops = automatic._crop_boxes((480, 640), 2, 512 / 1500)
        assert [layer for _, layer in crops] == [0] + 4 * [1] + 16 * [2]
        assert [box for box, _ in crops] == [WHOLE, *QUARTERS, *SIXTEENTHS]

    def test_grid(self):
        grid = automatic._grid(4)
        assert grid.shape == (16, 2)
        assert grid[1].tolist() == [0.375, 0.125]  # x first, row after row
        assert grid[-1].tolist() == [0.875, 0.875]

    def test_boxes(self):
        masks = torch.zeros(3, 5, 7, dtype=torch.bool)
        masks[0, 1:4, 2:6] = True
        masks[1, 4, 0] = True
        assert automatic._boxes(masks).tolist() == [[2, 1, 5, 3], [0, 4, 0, 4], [0, 0, 0, 0]]
        assert automatic._boxes(masks[:0]).shape == (0, 4)

    def test_stability(self):
        logits = torch.tensor([[[2.0, 0.5, -0.5, -2.0]], [[2.0, 2.0, -3.0, -3.0]], [[-9.0, -9.0, -9.0, -9.0]]])
        score = automatic._stability(logits, 0.0, 1.0)
        torch.testing.assert_close(score, torch.tensor([1 / 3, 1.0, float("nan")]), equal_nan=True)

    def test_near_crop_edge(self):
        boxes = torch.tensor([[30, 30, 60, 60], [10, 30, 60, 60], [30, 30, 60, 85], [30, 10, 60, 60]])
        assert automatic._near_crop_edge(boxes, (0, 0, 100, 100), (100, 100)).tolist() == [False] * 4
        # The crop's upper edge is the photo's too, its left edge is not.
        near = automatic._near_crop_edge(boxes, (200, 0, 300, 100), (400, 400))
        assert near.tolist() == [False, True, True, False]


class TestExceptions:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"output_mode": "png"}, "output_mode"),
            ({"points_per_batch": 0}, "points_per_batch"),
            ({"batch_size": 0}, "batch_size"),
            ({"max_area": 0}, "above 0 and at most 1; got 0"),
            ({"max_area": 1.5}, "above 0 and at most 1; got 1.5"),
            ({"crop_n_layers": -1}, "crop_n_layers"),
            ({"points_per_side": None}, "point_grids"),
            ({"point_grids": [np.zeros((1, 2))]}, "points_per_side"),
            ({"points_per_side": None, "point_grids": [np.zeros((2, 3))]}, r"\(G, 2\)"),
            ({"points_per_side": None, "point_grids": [np.zeros((1, 2))], "crop_n_layers": 1}, "2 arrays"),
            ({"points_per_side": 4, "crop_n_layers": 2, "crop_n_points_downscale_factor": 3}, "no points"),
            ({"points_per_side": 0}, "no points"),
            ({"points_per_side": float("nan")}, "finite numbers.*got points_per_side=nan"),
            ({"points_per_batch": 10**30}, r"below 2\*\*53; got points_per_batch=1000000"),
            ({"crop_n_layers": 1, "crop_n_points_downscale_factor": 0}, "downscale_factor must be positive; got 0"),
            ({"pred_iou_thresh": float("nan")}, "finite numbers.*got pred_iou_thresh=nan"),
            ({"crop_overlap_ratio": float("inf")}, "finite numbers.*got crop_overlap_ratio=inf"),
        ],
    )
    def test_settings(self, sam, photo, settings, message):
        with pytest.raises(ValueError, match=message):
            sam.generate_masks(photo, **settings)

    @pytest.mark.parametrize("name", ["box_nms_thresh", "points_per_side", "pred_iou_thresh", "min_mask_region_area"])
    def test_text(self, sam, photo, name):
        with pytest.raises(TypeError, match=f"must be numbers; got {name}='0.5'"):
            sam.generate_masks(photo, **{name: "0.5"})

    @pytest.mark.parametrize(
        "image",
        [np.zeros((9, 9, 2)), np.full((9, 9, 3), 255.0), np.zeros((0, 9, 3), np.uint8), torch.zeros(2, 9, 9)],
    )
    def test_images(self, sam, image):
        with pytest.raises(ValueError, match=r"\(C, H, W\)|Divide them by 255"):
            sam.generate_masks(image)

    def test_no_image(self, sam):
        with pytest.raises(TypeError, match="got int"):
            sam.generate_masks(3)
