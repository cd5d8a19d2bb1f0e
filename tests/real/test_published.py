"""The published MobileSAM on real photos: a small part of ``benchmarks/real.py parity`` and ``precision``."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kornia_tinyvit.data import InstanceDataset
from kornia_tinyvit.deploy import optimize
from kornia_tinyvit.ops import decode_rle, mask_boxes, mask_ious
from kornia_tinyvit.sam import ImageEmbedding
from tests.conftest import shared
from tests.real.data.record_masks import EVERYTHING, PROMPTS

RECORDED = json.loads((Path(__file__).parent / "data" / "original.json").read_text())
PIXELS = 3  # per mask, rounding at the threshold


def assert_same_masks(masks, recorded):
    assert len(masks) == len(recorded)
    for mask, code in zip(masks, recorded, strict=True):
        assert (np.asarray(mask) != decode_rle(code)).sum() <= PIXELS


class TestOriginal:
    """Masks of the authors' code, recorded by ``data/record_masks.py``."""

    @pytest.mark.parametrize("name", PROMPTS)
    def test_prompts(self, sam, embedding, name):
        ours = {"point_coords": "points", "point_labels": "labels", "box": "boxes"}
        prompts = {ours[key]: torch.tensor([value], dtype=torch.float32) for key, value in PROMPTS[name].items()}
        (first,) = sam.predict_masks(embedding, **prompts)
        low = first.best().low_res_logits
        (refined,) = sam.predict_masks(embedding, **prompts, masks=low, multimask_output=False)
        assert_same_masks([*first.masks()[0], *refined.masks()[0]], RECORDED[name]["masks"])
        np.testing.assert_allclose(first.scores[0].tolist(), RECORDED[name]["scores"], atol=1e-4)

    @pytest.mark.slow
    def test_everything(self, sam, embedding):
        (found,) = sam.generate_masks(embedding, **EVERYTHING)
        assert len(found) > 3
        assert_same_masks([mask.segmentation for mask in found], RECORDED["everything"]["masks"])
        scores = [mask.predicted_iou for mask in found]
        np.testing.assert_allclose(scores, RECORDED["everything"]["scores"], atol=1e-4)


@pytest.mark.slow
class TestPrecision:
    @pytest.fixture(scope="class")
    def objects(self):
        """Five large objects of a photo and their masks."""
        labels = shared("data/coco128/instance_segmentation/labels/val2017")
        images = InstanceDataset.open(shared("data/coco128/images/val2017"), instances=labels, min_area=1000)
        index = next(index for index in range(len(images)) if images.name(index).endswith("000000001000.jpg"))
        pixels, masks = images.read(index)
        return pixels, masks[:5]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_boxes(self, sam, objects, dtype):
        pixels, masks = objects
        inputs, geometries = sam.preprocess(pixels)
        encoder = optimize(sam.image_encoder, "eager", dtype, example=inputs, tune_allocator=False)
        reduced = sam.predict_best(ImageEmbedding(encoder(inputs), geometries), None, None, mask_boxes(masks))
        exact = sam.predict_best(sam.embed(pixels), None, None, mask_boxes(masks))
        ious, expected = (mask_ious(each.masks()[:, 0], masks).mean() for each in (reduced, exact))
        assert expected == pytest.approx(0.857, abs=0.005)
        assert abs(ious - expected) < (1e-4 if dtype == torch.float32 else 0.01)


@pytest.mark.slow
def test_everything_in_nuclei(sam):
    """Most nuclei have a mask, and ``max_area`` removes the background."""
    images = InstanceDataset.open(shared("data/nuclei"), "val")
    pixels, nuclei = min(map(images.read, range(20)), key=lambda sample: abs(len(sample[1]) - 20))
    found = sam.generate_masks(pixels, points_per_side=16, max_area=0.5)
    masks = torch.from_numpy(np.stack([mask.segmentation for mask in found]))
    assert (masks.float().mean((1, 2)) <= 0.5).all()
    best = torch.stack([mask_ious(masks, nucleus.expand_as(masks)).max() for nucleus in nuclei])
    assert (best >= 0.5).float().mean() > 0.6
