import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.autograd import gradcheck

from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.images import check_images, read_image
from kornia_tinyvit.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TRAINING_PRESETS,
    EvaluationPipeline,
    TrainingPipeline,
    TrainingPreset,
)
from tests.conftest import shared

PACKAGED = ["chelsea.png", "horse.png", "rocket.jpg"]
LANDSCAPES = ["000000000009.jpg", "000000000025.jpg", "000000000061.jpg"]
PORTRAITS = ["000000000036.jpg", "000000000049.jpg", "000000000086.jpg"]  # the last one is gray

#: Disables every augmentation of a square image of the right size; tests enable one at a time.
NEUTRAL = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "policy": None,
    "color_jitter": 0.0,
    "erasing": 0.0,
    "label_smoothing": 0.0,
}
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def by_pillow(photo: Image.Image, size: int, crop_fraction: float | None) -> torch.Tensor:
    """Return the image of the original evaluation preprocessing, in Pillow."""
    photo = photo.convert("RGB")
    if crop_fraction is None:
        photo = in_two_passes(photo, size, size)
    else:
        scale = int(size / crop_fraction) / min(photo.size)
        sides = [int(side * scale + 1e-6) for side in photo.size]
        photo = in_two_passes(photo, *sides)
        left, top = (round((side - size) / 2) for side in sides)
        photo = photo.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(photo)).movedim(-1, 0) / 255


def in_two_passes(photo: Image.Image, width: int, height: int) -> Image.Image:
    """Resize in the order of Pillow 13; earlier versions always resized the width first."""
    rows_first = photo.height - height > max(0, 2 * (photo.width - width))
    halfway = (photo.width, height) if rows_first else (width, photo.height)
    return photo.resize(halfway, Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)


def shades(count: int, size: int = 32) -> torch.Tensor:
    """Return constant images of distinct brightness, which identifies them in a mixture."""
    return (0.1 + 0.8 * torch.arange(count) / max(count - 1, 1)).view(-1, 1, 1, 1).repeat(1, 3, size, size)


class TestAgainstPillow:
    @pytest.mark.parametrize(("size", "crop_fraction"), [(224, "auto"), (384, "auto"), (64, 1.0)])
    @pytest.mark.parametrize("name", [*PACKAGED, *LANDSCAPES, *PORTRAITS])
    def test_photos(self, name, size, crop_fraction):
        path = ASSETS / "photos" / name if name in PACKAGED else shared("data/coco128/images/train2017") / name
        found = EvaluationPipeline(size, crop_fraction, **UNIT)(read_image(path)[None])[0]
        published = {224: 0.875, 384: None, 64: 1.0}[size]
        assert (found - by_pillow(Image.open(path), size, published)).abs().max() < 1e-2

    def test_photos_of_both_orientations(self):
        folder = shared("data/coco128/images/train2017")
        for name in (*LANDSCAPES, *PORTRAITS):
            width, height = Image.open(folder / name).size
            assert (width > height) == (name in LANDSCAPES)

    def test_published_sizes(self):
        pipeline = EvaluationPipeline(224, **UNIT)
        middle = torch.rand(1, 3, 256, 320)
        torch.testing.assert_close(pipeline(middle), middle[..., 16:240, 48:272])  # a short side of 256 is not resized

    @pytest.mark.parametrize(("side", "offset"), [(32, 0), (33, 0), (35, 2), (37, 2), (39, 4)])
    def test_offsets(self, side, offset):
        # Half a pixel is rounded to the even one, as Python and so torchvision do.
        x = torch.rand(1, 3, 32, side)
        pipeline = EvaluationPipeline(32, 1.0, **UNIT)
        torch.testing.assert_close(pipeline(x), x[..., offset : offset + 32])
        torch.testing.assert_close(pipeline(x.mT), x.mT[..., offset : offset + 32, :])


class TestEvaluationPipeline:
    @given(
        st.integers(0, 2),
        st.sampled_from([1, 3, 4]),
        st.integers(1, 70),
        st.integers(1, 70),
        st.integers(1, 48),
        st.sampled_from([None, 0.875, 0.3, 1.0]),
    )
    def test_shapes(self, batch, channels, height, width, size, crop_fraction):
        pipeline = EvaluationPipeline(size, crop_fraction, (0.0,) * channels, (1.0,) * channels)
        out = pipeline(torch.rand(batch, channels, height, width))
        assert out.shape == (batch, channels, size, size)
        assert ((out >= -2e-6) & (out <= 1 + 2e-6)).all()

    def test_normalizes(self):
        x = torch.rand(2, 3, 64, 64)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        torch.testing.assert_close(EvaluationPipeline(64, 1.0)(x), (x - mean) / std)

    def test_constant_images_stay_constant(self):
        out = EvaluationPipeline(48, **UNIT)(torch.full((1, 3, 37, 91), 0.3))
        torch.testing.assert_close(out, torch.full((1, 3, 48, 48), 0.3))

    @pytest.mark.parametrize("upright", [False, True])
    def test_very_long(self, upright):
        """Only the cropped part of a line of 200,000 pixels is resized, not all 256 x 51 million pixels."""
        x = torch.linspace(0, 1, 200_001).expand(1, 3, 1, -1)
        found = EvaluationPipeline(224).resize_and_crop(x.mT if upright else x)
        assert found.shape == (1, 3, 224, 224)
        assert (found - 0.5).abs().max() < 1e-4

    def test_no_numbers(self):
        with pytest.raises(ValueError, match="mean and std must be numbers, one per channel"):
            EvaluationPipeline(16, mean=({}, {}, {}))

    def test_one_pixel_high(self):
        x = torch.rand(1, 3, 1, 20)
        out = EvaluationPipeline(16, 1.0, **UNIT)(x)
        torch.testing.assert_close(out, out[..., :1, :].expand_as(out))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype(self, dtype):
        x = torch.rand(1, 3, 50, 40)
        pipeline = EvaluationPipeline(32)
        out = pipeline(x.to(dtype))
        assert out.dtype == dtype
        assert (out.float() - pipeline(x)).abs().max() < (0.05 if dtype == torch.bfloat16 else 0.01)

    @pytest.mark.parametrize("change", [copy.deepcopy, lambda m: m.double().float(), lambda m: m.to("cpu").train()])
    def test_copies(self, change):
        x = torch.rand(1, 3, 50, 40)
        pipeline = EvaluationPipeline(32)
        expected = pipeline(x)
        torch.testing.assert_close(change(pipeline)(x), expected)
        assert not pipeline.state_dict()

    @pytest.mark.parametrize("settings", [(12, 0.75), (9, None), (20, 1.0)])
    def test_gradcheck(self, settings):
        x = 0.4 + 0.2 * torch.rand(1, 3, 14, 11, dtype=torch.float64)  # the overshoot is far from being clamped
        assert gradcheck(EvaluationPipeline(*settings), (x.requires_grad_(),), fast_mode=True)

    def test_every_pixel_of_the_crop_matters(self):
        x = (0.4 + 0.2 * torch.rand(1, 3, 64, 90)).requires_grad_()
        EvaluationPipeline(32, 1.0)(x).sum().backward()
        assert (x.grad[..., 13:77] > 0).all()
        assert (x.grad[..., :8] == 0).all()

    def test_repr(self):
        assert repr(EvaluationPipeline(224)) == "EvaluationPipeline(img_size=224, crop_fraction=0.875)"
        assert repr(EvaluationPipeline(384)) == "EvaluationPipeline(img_size=384, crop_fraction=None)"


class TestExceptions:
    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, r"torch.uint8. Use x.float\(\) / 255"),
            (np.zeros((1, 3, 8, 8)), TypeError, "must be a floating point tensor"),
            (torch.rand(1, 4, 8, 8), ValueError, r"shape \(B, 3, H, W\); got \(1, 4, 8, 8\)"),
            (torch.rand(3, 8, 8), ValueError, r"shape \(B, 3, H, W\); got \(3, 8, 8\)"),
            (torch.rand(1, 3, 0, 8), ValueError, "at least 1x1 pixels; got 0x8"),
        ],
    )
    def test_images(self, images, error, message):
        for function in (check_images, EvaluationPipeline(8), lambda x: TrainingPipeline(8)(x, torch.zeros(1))):
            with pytest.raises(error, match=message):
                function(images)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"img_size": 0}, "img_size >= 1"),
            ({"crop_fraction": 0.0}, r"crop_fraction in \(0, 1\]"),
            ({"crop_fraction": 1.2}, "got 224 and 1.2"),
            ({"crop_fraction": math.nan}, "crop_fraction"),
            ({"crop_fraction": "center"}, "or 'auto'; got 224 and 'center'"),
            ({"mean": (0.5,)}, "one per channel"),
        ],
    )
    def test_evaluation_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            EvaluationPipeline(**settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"preset": "huge"}, "no preset 'huge'; choose one of in1k, finetune, distill, small"),
            ({"mixing": 1.0}, "no field mixing"),
            ({"policy": "auto"}, "policy must be 'rand', 'trivial' or None; got 'auto'"),
        ],
    )
    def test_training_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            TrainingPipeline(32, 10, **settings)

    @pytest.mark.parametrize("labels", [torch.zeros(3), torch.zeros(2, 1), torch.tensor(0)])
    def test_labels(self, labels):
        with pytest.raises(ValueError, match="Expected 2 labels, one per image; got the shape"):
            TrainingPipeline(32, 10)(torch.rand(2, 3, 32, 32), labels)


class TestTrainingPipeline:
    @pytest.mark.parametrize("preset", [*TRAINING_PRESETS, TrainingPreset(policy="trivial", mixup=0.2)])
    @pytest.mark.parametrize("batch", [0, 1, 5])
    def test_shapes(self, preset, batch):
        torch.manual_seed(0)
        pipeline = TrainingPipeline(32, 7, preset)
        for size in ((32, 32), (45, 60), (70, 20)):
            images, targets = pipeline(torch.rand(batch, 3, *size), torch.arange(batch) % 7)
            assert images.shape == (batch, 3, 32, 32)
            assert images.isfinite().all()
            assert targets.shape == (batch, 7)
            assert (targets >= 0).all()
            torch.testing.assert_close(targets.sum(1), torch.ones(batch))

    @pytest.mark.parametrize("changes", [{"cutmix": 1.0}, {"mixup": 1.0}, {"mixup": 1.0, "cutmix": 1.0}])
    def test_no_images(self, changes):
        images, targets = TrainingPipeline(32, 7, **changes)(torch.rand(0, 3, 40, 40), torch.zeros(0).long())
        assert images.shape == (0, 3, 32, 32)
        assert targets.shape == (0, 7)

    def test_recipes(self):
        assert TRAINING_PRESETS["in1k"].mixup == 0.8
        assert TRAINING_PRESETS["in1k"].cutmix == 1.0
        assert TRAINING_PRESETS["distill"].label_smoothing == 0
        assert TrainingPipeline(32, 7, "small", mixup=0.3).preset.mixup == 0.3
        assert TRAINING_PRESETS["small"].mixup == 0

    def test_crops_are_resized_smoothly(self):
        ramp = torch.linspace(0.2, 0.8, 8).expand(1, 3, 8, 8)
        out, _ = TrainingPipeline(32, 4, **UNIT, **NEUTRAL)(ramp, torch.tensor([0]))
        steps = out.diff(dim=3)[..., 4:-4]
        assert (steps > 0.01).all()

    def test_label_smoothing(self):
        _, targets = TrainingPipeline(32, 4, **NEUTRAL | {"label_smoothing": 0.2})(shades(2), torch.tensor([2, 0]))
        torch.testing.assert_close(targets, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))

    def test_normalizes(self):
        x = torch.rand(2, 3, 32, 32)
        out, targets = TrainingPipeline(32, 4, **NEUTRAL)(x, torch.tensor([3, 1]))
        torch.testing.assert_close(out, EvaluationPipeline(32, 1.0)(x), atol=1e-5, rtol=1e-5)
        assert targets.tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]

    @pytest.mark.parametrize("preset", ["in1k", "finetune", "small"])
    def test_reproducible(self, preset):
        pipeline, x = TrainingPipeline(32, 7, preset), torch.rand(4, 3, 40, 40)
        results = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            results.append(pipeline(x, torch.arange(4)))
        for first, second, other in zip(*results, strict=True):
            assert torch.equal(first, second)
            assert preset != "in1k" or not torch.equal(first, other)
        assert not torch.equal(results[0][0], results[2][0])

    def test_images_are_augmented_independently(self):
        torch.manual_seed(0)
        for field, value in {"crop_scale": (0.1, 0.5), "policy": "rand", "color_jitter": 0.9, "erasing": 1.0}.items():
            x = torch.rand(1, 3, 32, 32).expand(6, -1, -1, -1)
            out, _ = TrainingPipeline(32, 7, **NEUTRAL | {field: value})(x, torch.arange(6))
            assert len({image.sum().item() for image in out}) > 1, field

    def test_flip(self):
        torch.manual_seed(0)
        x = torch.rand(40, 3, 32, 32)
        out, _ = TrainingPipeline(32, 40, **UNIT, **NEUTRAL | {"flip": 0.5})(x, torch.arange(40))
        flipped = (out == x.flip(3)).flatten(1).all(1)
        assert ((out == x).flatten(1).all(1) ^ flipped).all()
        assert 8 < flipped.sum() < 32

    def test_erases_to_the_mean_color(self):
        torch.manual_seed(0)
        x = shades(8) + 0.05
        out, _ = TrainingPipeline(32, 8, **NEUTRAL | {"erasing": 1.0})(x, torch.arange(8))
        erased = out == 0
        fractions = erased.float().mean((1, 2, 3))
        assert ((fractions > 0.01) & (fractions < 0.4)).all()
        assert torch.equal(erased.all(1), erased.any(1))
        kept = EvaluationPipeline(32, 1.0)(x)
        torch.testing.assert_close(out[~erased], kept[~erased], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("preset", ["in1k", "finetune", "small"])
    def test_gradients_reach_the_pixels(self, preset):
        torch.manual_seed(1)
        x = (0.3 + 0.4 * torch.rand(4, 3, 40, 40)).requires_grad_()
        out, _ = TrainingPipeline(32, 7, preset, policy=None)(x, torch.arange(4))
        out.square().sum().backward()
        assert x.grad.isfinite().all()
        assert (x.grad != 0).any(dim=(1, 2, 3)).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_dtype(self, dtype):
        out, _ = TrainingPipeline(32, 7, "in1k")(torch.rand(4, 3, 40, 40, dtype=dtype), torch.arange(4))
        assert out.dtype == dtype


class TestMixing:
    COUNT = 16

    def mix(self, **changes):
        pipeline = TrainingPipeline(32, self.COUNT, **UNIT, **NEUTRAL | changes)
        x = shades(self.COUNT)
        return x, *pipeline(x, torch.arange(self.COUNT))

    @pytest.mark.parametrize("changes", [{"mixup": 1.0}, {"cutmix": 1.0}], ids=["mixup", "cutmix"])
    @pytest.mark.parametrize("seed", range(5))
    def test_targets_are_the_fractions_of_the_images(self, changes, seed):
        torch.manual_seed(seed)
        x, out, targets = self.mix(**changes)
        brightness = targets @ x.mean((1, 2, 3))
        torch.testing.assert_close(out.mean((1, 2, 3)), brightness, atol=1e-4, rtol=0)
        assert (targets.sum(1) - 1).abs().max() < 1e-6
        assert ((targets > 0).sum(1) > 1).sum() >= self.COUNT // 2

    def test_mixup_mixes_whole_images(self):
        torch.manual_seed(0)
        x = torch.rand(self.COUNT, 3, 32, 32)
        out, targets = TrainingPipeline(32, self.COUNT, **UNIT, **NEUTRAL, mixup=0.8)(x, torch.arange(self.COUNT))
        torch.testing.assert_close(out, torch.einsum("bn,nchw->bchw", targets, x))

    def test_cutmix_target_is_the_changed_area(self):
        torch.manual_seed(0)
        x, out, targets = self.mix(cutmix=1.0)
        changed = (out != x).all(1)
        own = targets.diagonal()
        torch.testing.assert_close(changed.float().mean((1, 2)), 1 - own)
        for image, mask, target in zip(out, changed, targets.fill_diagonal_(0), strict=True):
            if mask.any():
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                assert mask.sum() == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                assert torch.equal(image[:, mask], x[target.argmax(), :, 0, :1].expand(3, mask.sum()))

    @pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
    def test_mixup_draws_from_beta(self, alpha):
        torch.manual_seed(0)
        count = 4000
        pipeline = TrainingPipeline(2, count, **UNIT, **NEUTRAL | {"mixup": alpha})
        x = torch.linspace(0, 1, count).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        _, targets = pipeline(x, torch.arange(count))
        weights = 1 - targets.diagonal()
        assert weights.mean() == pytest.approx(0.5, abs=0.02)
        assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)

    def test_both_are_drawn(self):
        torch.manual_seed(0)
        x = shades(self.COUNT)
        pipeline = TrainingPipeline(32, self.COUNT, **UNIT, **NEUTRAL, mixup=0.8, cutmix=1.0)
        cut = 0
        for _ in range(40):
            out, targets = pipeline(x, torch.arange(self.COUNT))
            torch.testing.assert_close(out.mean((1, 2, 3)), targets @ x.mean((1, 2, 3)), atol=1e-4, rtol=0)
            cut += out.flatten(1).std(1).max().item() > 1e-3  # mixup keeps constant images constant
        assert 8 < cut < 32


class TestGradientsOfWhite:
    def test_white_is_not_overshoot(self):
        """Pure white resizes to white, and every pixel still counts."""
        white = torch.ones(1, 3, 300, 300, requires_grad=True)
        out = EvaluationPipeline(64, crop_fraction=1.0).resize_and_crop(white)
        torch.testing.assert_close(out, torch.ones_like(out))
        out.sum().backward()
        torch.testing.assert_close(white.grad.sum(), out.new_tensor(out.numel()))
