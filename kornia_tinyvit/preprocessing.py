"""Evaluation and training pipelines made of kornia's operators, on any device and with gradients to the pixels."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from kornia.augmentation.auto import RandAugment, TrivialAugment
from kornia.enhance import normalize
from torch import Tensor, nn

from kornia_tinyvit.config import TinyViTConfig, is_number
from kornia_tinyvit.images import check_images

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "TRAINING_PRESETS",
    "EvaluationPipeline",
    "Preprocessing",
    "TrainingPipeline",
    "TrainingPreset",
    "check_counts",
    "default_preprocessing",
    "find_preset",
    "resize_images",
]

#: Channel means of ImageNet's images in [0, 1], which every published checkpoint is normalized with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
#: Channel deviations of ImageNet's images in [0, 1].
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_FRACTION = 224 / 256  # the originals resize the short side to 256 before cropping 224
_ROUNDING = 1e-6  # what a sum over pure white may exceed 1 by; clamping that away would stop the gradient there
# Random crops show things larger than they are in whole images; a small border cut off in the test makes up for that
# (arXiv:1906.06423). On CIFAR-10 at 64 pixels this is worth 0.9 points of top-1.
SMALL_CROP_FRACTION = 15 / 16
SMALL_BELOW = 224
_LONGEST = 256  # times the short side
_SMOOTH = {"antialias": True, "align_corners": False}
#: Names of interpolations, and how torch does them.
INTERPOLATIONS: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "bicubic", **_SMOOTH},
    "bilinear": {"mode": "bilinear", **_SMOOTH},
    "nearest": {"mode": "nearest-exact"},
}
SQUARE_FROM = 384  # from this size on the originals squeeze the whole image into the square


@dataclass(frozen=True)
class Preprocessing:
    """What images in [0, 1] go through before a network: a part of each network and of every file it is saved to.

    Args:
        img_size: side in pixels of the square that comes out.
        crop_fraction: fraction of the resized short side that the center crop keeps, in (0, 1]; ``None`` resizes the
            whole image to the square whatever its aspect ratio; ``"auto"`` is the originals' choice for the size:
            7/8 from 224 pixels on, ``None`` from 384 on, and 15/16 below 224, which they do not cover.
        interpolation: ``"bicubic"``, ``"bilinear"`` (both antialiased) or ``"nearest"``.
        mean: channel means to subtract, for values in [0, 1].
        std: channel standard deviations to divide by.

    Raises:
        ValueError: if a value is out of its range.

    Example:
        >>> Preprocessing(384).crop_fraction is None
        True
    """

    img_size: int = 224
    crop_fraction: float | str | None = "auto"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        size: Any = self.img_size
        crop: Any = self.crop_fraction
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        if whole and crop == "auto":
            object.__setattr__(self, "crop_fraction", crop := _usual_crop_fraction(size))
        if not whole or not (crop is None or (is_number(crop) and 0 < crop <= 1)):
            raise ValueError(
                "Preprocessing needs img_size >= 1 and crop_fraction in (0, 1], None or 'auto'; "
                f"got {size!r} and {crop!r}."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is one of {', '.join(INTERPOLATIONS)}; got {self.interpolation!r}.")
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not all(is_number(each) for each in (*self.mean, *self.std)):
            raise ValueError(f"mean and std are numbers, one per channel; got {self.mean} and {self.std}.")
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean and std must have as many entries, one per channel; got {self.mean}, {self.std}.")
        if 0 in self.std:
            raise ValueError(f"std must not be 0, since it divides; got {self.std}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Rebuild it from :meth:`to_dict`'s values; what is missing has its default.

        Raises:
            ValueError: if a field is unknown or out of its range.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"Preprocessing has no field {', '.join(map(str, unknown))}.")
        return cls(**values)

    def resize(self, img_size: int) -> Preprocessing:
        """Return the same for another size; a crop that is the usual one becomes that of the new size."""
        usual = self.crop_fraction == _usual_crop_fraction(self.img_size)
        return dataclasses.replace(self, img_size=img_size, crop_fraction="auto" if usual else self.crop_fraction)

    def with_channels(self, channels: int) -> Preprocessing:
        """Return the same for images of other channels: one has the average statistics, more repeat them."""
        have = len(self.mean)
        if channels == have:
            return self
        mean, std = self.mean, self.std
        if channels == 1:
            mean, std = (sum(mean) / have,), (sum(std) / have,)
        repeated = [index % len(mean) for index in range(channels)]
        return dataclasses.replace(self, mean=tuple(mean[i] for i in repeated), std=tuple(std[i] for i in repeated))


class EvaluationPipeline(nn.Module):
    """Resize, crop and normalize images as a network is evaluated.

    With a crop the short side is resized to ``img_size / crop_fraction`` and the center is cropped; without one the
    whole image is resized to the square. Bicubic and bilinear resizing are antialiased and agree with Pillow's
    within 1e-2.

    Args:
        img_size: side in pixels of the square that comes out.
        crop_fraction: as in :class:`Preprocessing`.
        mean: channel means to subtract, for values in [0, 1].
        std: channel standard deviations to divide by.
        interpolation: as in :class:`Preprocessing`.

    Attributes:
        settings: the :class:`Preprocessing` that it does.

    Raises:
        ValueError: if a value is out of its range.

    Example:
        >>> EvaluationPipeline(224)(torch.rand(1, 3, 480, 640)).shape
        torch.Size([1, 3, 224, 224])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        img_size: int = 224,
        crop_fraction: float | str | None = "auto",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__()
        self.settings = settings = Preprocessing(img_size, crop_fraction, interpolation, mean, std)
        self.img_size, self.crop_fraction = settings.img_size, cast("float | None", settings.crop_fraction)
        self.register_buffer("mean", torch.tensor(settings.mean), persistent=False)
        self.register_buffer("std", torch.tensor(settings.std), persistent=False)

    @classmethod
    def from_preprocessing(cls, preprocessing: Preprocessing) -> EvaluationPipeline:
        """Return the module that does what a network's ``preprocessing`` says."""
        return cls(**vars(preprocessing))

    def forward(self, images: Tensor) -> Tensor:
        """Map images :math:`(B, C, H, W)` in [0, 1] to normalized ones :math:`(B, C, S, S)`.

        Raises:
            TypeError: if ``images`` is not a floating point tensor.
            ValueError: if its shape is another.
        """
        check_images(images, len(self.mean))
        return normalize(self.resize_and_crop(images), self.mean.to(images), self.std.to(images))

    def resize_and_crop(self, images: Tensor) -> Tensor:
        """Map images :math:`(B, C, H, W)` in [0, 1] to :math:`(B, C, S, S)` in [0, 1] but for rounding (1e-6)."""
        size, mode = self.img_size, self.settings.interpolation
        if self.crop_fraction is None:
            return resize_images(images, size, size, mode)
        short = int(size / self.crop_fraction)
        images = _without_ends(images)
        height, width = images.shape[-2:]
        if height <= width:
            images = resize_images(images, short, max(short, int(short * width / height)), mode)
        else:
            images = resize_images(images, max(short, int(short * height / width)), short, mode)
        top = round((images.shape[-2] - size) / 2)
        left = round((images.shape[-1] - size) / 2)
        return images[..., top : top + size, left : left + size]

    def extra_repr(self) -> str:
        """Show the two numbers that decide the geometry."""
        return f"img_size={self.img_size}, crop_fraction={self.crop_fraction}"


def _without_ends(images: Tensor) -> Tensor:
    """Return the middle of very long images: the crop takes it anyway, and to resize all would take gigabytes."""
    height, width = images.shape[-2:]
    longest = _LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return images[..., top : top + longest, left : left + longest]


def _usual_crop_fraction(img_size: int) -> float | None:
    if img_size < SMALL_BELOW:
        return SMALL_CROP_FRACTION
    return CROP_FRACTION if img_size < SQUARE_FROM else None


def resize_images(images: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """Resize images as Pillow does: one direction after the other, each time clamping the bicubic overshoot.

    As in Pillow 13, the width goes first unless the height loses more than twice as many pixels.
    kornia.geometry.resize blurs with a Gaussian before it samples, which is up to 0.3 away from Pillow on photos;
    torch's antialiased kernel is Pillow's.

    Args:
        images: images :math:`(B, C, H, W)` in [0, 1].
        height: rows of the images that come out.
        width: their columns.
        interpolation: one of ``"bicubic"``, ``"bilinear"`` and ``"nearest"``.

    Returns:
        Images :math:`(B, C, height, width)` in [0, 1] but for rounding (1e-6).
    """
    if images.shape[0] == 0:
        return images.new_zeros(0, images.shape[1], height, width)
    rows, columns = images.shape[-2:]
    rows_first = rows - height > max(0, 2 * (columns - width))
    halfway = (height, columns) if rows_first else (rows, width)
    resized = images if images.dtype in (torch.float32, torch.float64) else images.float()
    for size in (halfway, (height, width)):
        if tuple(resized.shape[-2:]) != size:
            resized = F.interpolate(resized, size, **INTERPOLATIONS[interpolation])
            resized = resized.clamp(-_ROUNDING, 1 + _ROUNDING)
    return resized.to(images.dtype)


@dataclass(frozen=True)
class TrainingPreset:
    """How images are changed for training.

    Args:
        crop_scale: range of the share of the image that the random crop covers.
        crop_ratio: range of the crop's width over height.
        flip: probability of a horizontal flip.
        policy: ``"rand"`` for RandAugment, ``"trivial"`` for TrivialAugment, or ``None``.
        color_jitter: strength of brightness, contrast and saturation changes.
        erasing: probability of erasing a rectangle, which becomes the mean color.
        mixup: parameter of mixup's Beta distribution; 0 leaves it out.
        cutmix: parameter of cutmix's Beta distribution; 0 leaves it out. With both, each batch draws one of them.
        mix_probability: probability that a batch (here) or a pair (in a replayed augmentation) is mixed at all.
        label_smoothing: share of the target that is spread over all classes.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    policy: str | None = "rand"
    color_jitter: float = 0.4
    erasing: float = 0.25
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    label_smoothing: float = 0.1


#: ``"in1k"`` and ``"finetune"`` are the paper's recipes for training from scratch and for fine-tuning; ``"small"`` is
#: milder, for images of 32 or 64 pixels and short trainings; ``"distill"`` has no labels to smooth or mix;
#: ``"semantic"`` is for images whose pixels are labeled, ``"promptable"`` for those with a mask for each object,
#: ``"detection"`` for those with boxes.
TRAINING_PRESETS: dict[str, TrainingPreset] = {
    "in1k": TrainingPreset(mixup=0.8, cutmix=1.0),
    "finetune": TrainingPreset(),
    "distill": TrainingPreset(label_smoothing=0.0),
    "small": TrainingPreset(crop_scale=(0.5, 1.0), crop_ratio=(0.8, 1.25), policy=None, color_jitter=0.2, erasing=0.4),
    "semantic": TrainingPreset(crop_scale=(0.25, 1.0), policy=None, color_jitter=0.3, erasing=0.0, label_smoothing=0.0),
    "promptable": TrainingPreset(
        crop_scale=(0.5, 1.0), crop_ratio=(0.8, 1.25), policy=None, color_jitter=0.2, erasing=0.0, label_smoothing=0.0
    ),
    "detection": TrainingPreset(crop_scale=(0.3, 1.0), policy=None, color_jitter=0.3, erasing=0.0, label_smoothing=0.0),
}


def find_preset(preset: str | TrainingPreset, **changes: object) -> TrainingPreset:
    """Return a preset by its name, with fields replaced.

    Args:
        preset: a name of :data:`TRAINING_PRESETS` or a :class:`TrainingPreset`.
        **changes: fields to replace.

    Raises:
        ValueError: if the preset, its policy or a field is unknown.
    """
    if isinstance(preset, str):
        if preset not in TRAINING_PRESETS:
            raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(TRAINING_PRESETS)}.")
        preset = TRAINING_PRESETS[preset]
    unknown = sorted(changes.keys() - {field.name for field in dataclasses.fields(preset)})
    if unknown:
        raise ValueError(f"TrainingPreset has no field {', '.join(unknown)}.")
    preset = dataclasses.replace(preset, **changes)  # type: ignore[arg-type]
    if preset.policy not in (None, "rand", "trivial"):
        raise ValueError(f"policy must be 'rand', 'trivial' or None; got {preset.policy!r}.")
    return preset


class TrainingPipeline(nn.Module):
    """Augment and normalize a batch of images and turn its labels into soft targets.

    Crop, flip, RandAugment or TrivialAugment, color jitter, normalization, erasing, and mixup or cutmix, all by
    kornia, in this order and on the device of the images. RandAugment has kornia's magnitudes for ``n=2, m=9``.

    Args:
        img_size: side in pixels of the square that comes out.
        num_classes: classes of the targets.
        preset: a name of :data:`TRAINING_PRESETS` or a :class:`TrainingPreset`.
        mean: channel means to subtract, for values in [0, 1].
        std: channel deviations to divide by.
        **changes: fields of the preset to replace.

    Raises:
        ValueError: if the preset, its policy or a field is unknown.

    Example:
        >>> pipeline = TrainingPipeline(64, num_classes=10, preset="small", mixup=0.8)
        >>> images, targets = pipeline(torch.rand(4, 3, 48, 48), torch.tensor([0, 1, 2, 3]))
        >>> images.shape, targets.shape
        (torch.Size([4, 3, 64, 64]), torch.Size([4, 10]))
    """

    def __init__(
        self,
        img_size: int = 224,
        num_classes: int = 1000,
        preset: str | TrainingPreset = "finetune",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        **changes: object,
    ) -> None:
        super().__init__()
        self.preset = preset = find_preset(preset, **changes)
        self.num_classes = num_classes
        self.augment = _augmentations(img_size, preset, mean, std)
        self.mixers = nn.ModuleList()
        if preset.mixup:
            self.mixers.append(_BetaMixUp(preset.mixup))
        if preset.cutmix:
            self.mixers.append(
                K.RandomCutMixV2(beta=preset.cutmix, use_correct_lambda=True, data_keys=["input", "class"])
            )

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Map images and labels to what the network and the loss take.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1].
            labels: class indices :math:`(B,)`.

        Returns:
            Normalized images :math:`(B, C, S, S)` and targets :math:`(B, classes)` whose rows sum to 1, for
            :func:`torch.nn.functional.cross_entropy`.

        Raises:
            TypeError: if ``images`` is not a floating point tensor.
            ValueError: if the shapes do not fit.
        """
        check_images(images)
        if labels.shape != images.shape[:1]:
            raise ValueError(f"Expected {images.shape[0]} labels, one an image; got the shape {tuple(labels.shape)}.")
        images = self.augment(images)
        first = second = labels
        share = images.new_zeros(len(labels))
        if len(self.mixers) and len(labels) and torch.rand(()) < self.preset.mix_probability:
            mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
            images, mixed = mixer(images, labels)
            first, second, share = mixed.view(-1, 3).unbind(1)
            if isinstance(mixer, K.RandomCutMixV2):  # which tells the first image's share, and mixup the second's
                share = 1 - share
        targets = torch.lerp(self._one_hot(first), self._one_hot(second), share.unsqueeze(1).float())
        smoothing = self.preset.label_smoothing
        return images, targets * (1 - smoothing) + smoothing / self.num_classes

    def _one_hot(self, labels: Tensor) -> Tensor:
        return F.one_hot(labels.long(), self.num_classes).float()


def _augmentations(
    img_size: int, preset: TrainingPreset, mean: tuple[float, ...], std: tuple[float, ...]
) -> K.AugmentationSequential:
    jitter = preset.color_jitter
    steps: list[Any] = [
        K.RandomResizedCrop((img_size, img_size), preset.crop_scale, preset.crop_ratio, resample="BICUBIC"),
        K.RandomHorizontalFlip(p=preset.flip),
    ]
    if preset.policy:
        steps.append(RandAugment(n=2, m=9) if preset.policy == "rand" else TrivialAugment())
    if jitter:
        steps.append(K.ColorJitter(jitter, jitter, jitter, 0.0))
    steps.append(K.Normalize(torch.tensor(mean), torch.tensor(std)))
    if preset.erasing:
        steps.append(K.RandomErasing(p=preset.erasing))
    return K.AugmentationSequential(*steps, data_keys=["input"])


class _BetaMixUp(K.RandomMixUpV2):
    """kornia's mixup with its uniform share replaced by the recipe's Beta distribution."""

    def __init__(self, alpha: float) -> None:
        super().__init__(data_keys=["input", "class"])
        self.share = torch.distributions.Beta(alpha, alpha)

    def forward_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        params = super().forward_parameters(batch_shape)
        params["mixup_lambdas"] = self.share.sample((batch_shape[0],)).to(params["mixup_lambdas"])
        return params


def check_counts(**numbers: int) -> None:
    """Refuse arguments, told by their names, that are no whole numbers from 1 up.

    Raises:
        ValueError: naming the argument.
    """
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or number > sys.maxsize:
            raise ValueError(f"{name} must be a whole number that fits into memory; got {number!r}.")
        if number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}.")


def default_preprocessing(config: TinyViTConfig) -> Preprocessing:
    """Return that of weights that state none: the network's resolution, ImageNet's statistics for its channels."""
    return Preprocessing(config.img_size).with_channels(config.in_chans)
