"""Evaluation and training transforms of kornia's operators, differentiable and on any device."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, cast

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from kornia.augmentation.auto import RandAugment, TrivialAugment
from kornia.enhance import normalize
from torch import Tensor, nn

from kornia_tinyvit.config import TinyViTConfig, check_fields, is_integer, is_number
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
    "rotations",
]

#: Channel means of ImageNet for images in [0, 1]; every published checkpoint uses them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
#: Channel standard deviations of ImageNet for images in [0, 1].
IMAGENET_STD = (0.229, 0.224, 0.225)

CROP_FRACTION = 224 / 256  # the original evaluation resizes the short side to 256 and crops 224
SQUARE_FROM = 384  # from this size on, the original evaluation resizes the whole image to a square
# Random crops magnify objects; a small crop in evaluation compensates for it (arXiv:1906.06423). On CIFAR-10 at 64
# pixels it adds 0.9 points of top-1 accuracy.
SMALL_CROP_FRACTION = 15 / 16
SMALL_BELOW = 224
_ROUNDING = 1e-6  # overshoot of a weighted sum over pure white, which is not clamped: that would stop the gradient
_LONGEST = 256  # times the short side
_SMOOTH = {"antialias": True, "align_corners": False}
#: Arguments of :func:`torch.nn.functional.interpolate` by the name of the interpolation.
INTERPOLATIONS: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "bicubic", **_SMOOTH},
    "bilinear": {"mode": "bilinear", **_SMOOTH},
    "nearest": {"mode": "nearest-exact"},
}


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of images in [0, 1], stored with each network and in its checkpoints.

    Args:
        img_size: side of the square output in pixels.
        crop_fraction: fraction of the resized short side that the center crop keeps, in (0, 1]. ``None`` resizes the
            whole image to the square, whatever its aspect ratio. ``"auto"`` chooses by ``img_size`` as the original
            evaluation does, ``None`` from 384 pixels on and 7/8 from 224 on; smaller sizes, which it does not cover,
            get 15/16.
        interpolation: ``"bicubic"``, ``"bilinear"`` (both antialiased) or ``"nearest"``.
        mean: channel means to subtract, for values in [0, 1].
        std: channel standard deviations to divide by.

    Raises:
        ValueError: if a value is out of range.

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
        crop: Any = self.crop_fraction
        known_size = is_integer(self.img_size, 1)
        if known_size and crop == "auto":
            object.__setattr__(self, "crop_fraction", crop := _auto_crop_fraction(self.img_size))
        if not known_size or not (crop is None or (is_number(crop) and 0 < crop <= 1)):
            raise ValueError(
                "Preprocessing needs img_size >= 1 and crop_fraction in (0, 1], None or 'auto'; "
                f"got {self.img_size!r} and {crop!r}."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {self.interpolation!r}.")
        mean, std = tuple(self.mean), tuple(self.std)
        numbers = all(is_number(value) for value in mean + std)
        if not numbers or len(mean) != len(std) or not mean or 0 in std:
            raise ValueError(f"mean and std must be numbers, one per channel, std not 0; got {mean} and {std}.")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @property
    def statistics(self) -> dict[str, tuple[float, ...]]:
        """The fields ``mean`` and ``std``, as arguments of augmentations."""
        return {"mean": self.mean, "std": self.std}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Build a preprocessing from the values of :meth:`to_dict`.

        Args:
            values: values by field name; missing fields get their defaults.

        Raises:
            ValueError: if a field is unknown or out of range.
        """
        check_fields(cls, values)
        return cls(**values)

    def resize(self, img_size: int) -> Preprocessing:
        """Return the preprocessing for another size; a crop that ``"auto"`` chooses is chosen anew.

        Args:
            img_size: side of the square output in pixels.
        """
        auto = self.crop_fraction == _auto_crop_fraction(self.img_size)
        return dataclasses.replace(self, img_size=img_size, crop_fraction="auto" if auto else self.crop_fraction)

    def with_channels(self, channels: int) -> Preprocessing:
        """Return the preprocessing for another number of channels.

        Args:
            channels: 1 averages the statistics of the channels; other numbers repeat or truncate them.
        """
        have = len(self.mean)
        if channels == 1:
            return dataclasses.replace(self, mean=(sum(self.mean) / have,), std=(sum(self.std) / have,))
        mean, std = (tuple(islice(cycle(values), channels)) for values in (self.mean, self.std))
        return dataclasses.replace(self, mean=mean, std=std)


class EvaluationPipeline(nn.Module):
    """Resize, crop and normalize images for evaluation.

    With a crop, the short side is resized to ``img_size / crop_fraction`` and the center is cropped. Without one, the
    whole image is resized to the square. Bicubic and bilinear resizing agree with Pillow's within 1e-2.

    Args:
        img_size: side of the square output in pixels.
        crop_fraction: see :class:`Preprocessing`.
        mean: channel means to subtract, for values in [0, 1].
        std: channel standard deviations to divide by.
        interpolation: see :class:`Preprocessing`.

    Attributes:
        settings: the arguments as a :class:`Preprocessing`.

    Raises:
        ValueError: if a value is out of range.

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
        """Return the module for a network's ``preprocessing``."""
        return cls(**vars(preprocessing))

    def forward(self, images: Tensor) -> Tensor:
        """Return normalized images :math:`(B, C, S, S)`.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1].

        Raises:
            TypeError: if ``images`` is not a floating point tensor.
            ValueError: if it has another shape.
        """
        check_images(images, len(self.mean))
        return normalize(self.resize_and_crop(images), self.mean.to(images), self.std.to(images))

    def resize_and_crop(self, images: Tensor) -> Tensor:
        """Return resized and cropped images :math:`(B, C, S, S)` in [0, 1], up to rounding errors of 1e-6.

        Args:
            images: images :math:`(B, C, H, W)` in [0, 1].
        """
        size, mode = self.img_size, self.settings.interpolation
        if self.crop_fraction is None:
            return resize_images(images, size, size, mode)
        short = int(size / self.crop_fraction)
        images = _crop_ends(images)
        smallest = min(images.shape[-2:])
        height, width = (max(short, int(short * side / smallest)) for side in images.shape[-2:])
        images = resize_images(images, height, width, mode)
        top, left = round((height - size) / 2), round((width - size) / 2)
        return images[..., top : top + size, left : left + size]

    def extra_repr(self) -> str:
        """Return the size and the crop fraction for ``repr``."""
        return f"img_size={self.img_size}, crop_fraction={self.crop_fraction}"


def _crop_ends(images: Tensor) -> Tensor:
    """Return the middle of very long images, which contains the crop; resizing all of it would take gigabytes."""
    height, width = images.shape[-2:]
    longest = _LONGEST * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    return images[..., top : top + longest, left : left + longest]


def _auto_crop_fraction(img_size: int) -> float | None:
    if img_size < SMALL_BELOW:
        return SMALL_CROP_FRACTION
    return CROP_FRACTION if img_size < SQUARE_FROM else None


def resize_images(images: Tensor, height: int, width: int, interpolation: str = "bicubic") -> Tensor:
    """Resize images as Pillow does: one dimension at a time, clamping the overshoot of the bicubic kernel.

    As in Pillow 13, the width is resized first unless the height loses more than twice as many pixels. torch's
    antialiased kernel is Pillow's; kornia.geometry.resize blurs with a Gaussian before it samples, which differs from
    Pillow by up to 0.3 on photos.

    Args:
        images: images :math:`(B, C, H, W)` in [0, 1].
        height: output height in pixels.
        width: output width in pixels.
        interpolation: ``"bicubic"``, ``"bilinear"`` or ``"nearest"``.

    Returns:
        Images :math:`(B, C, height, width)` in [0, 1], up to rounding errors of 1e-6.
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
    """Parameters of the training augmentations.

    Args:
        crop_scale: range of the area of the random crop as a fraction of the image's.
        crop_ratio: range of the aspect ratio (width over height) of the random crop.
        flip: probability of a horizontal flip.
        rotate: rotate by a random multiple of 90 degrees, for images without an upright direction, such as those of a
            microscope or a satellite; with ``flip`` it includes vertical flips.
        policy: ``"rand"`` for RandAugment, ``"trivial"`` for TrivialAugment, or ``None``.
        color_jitter: strength of the changes of brightness, contrast and saturation.
        erasing: probability of replacing a random rectangle by the mean color.
        mixup: alpha of mixup's Beta distribution; 0 disables it.
        cutmix: alpha of cutmix's Beta distribution; 0 disables it. If both are enabled, each batch gets one of them
            at random.
        mix_probability: probability of mixing a batch (here) or a pair (in a replayable augmentation).
        label_smoothing: fraction of the target that is distributed uniformly over the classes.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rotate: bool = False
    policy: str | None = "rand"
    color_jitter: float = 0.4
    erasing: float = 0.25
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    label_smoothing: float = 0.1


#: ``"in1k"`` and ``"finetune"`` are the paper's recipes for training from scratch and for fine-tuning. ``"small"`` has
#: weaker augmentations, for images of 32 or 64 pixels and short trainings. ``"distill"`` is for soft labels,
#: ``"semantic"`` for class masks, ``"promptable"`` for instance masks and ``"detection"`` for boxes.
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
    """Return a preset by name, with some fields replaced.

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
    check_fields(TrainingPreset, changes)
    preset = dataclasses.replace(preset, **changes)  # type: ignore[arg-type]
    if preset.policy not in (None, "rand", "trivial"):
        raise ValueError(f"policy must be 'rand', 'trivial' or None; got {preset.policy!r}.")
    return preset


def rotations(preset: TrainingPreset) -> list[K.RandomRotation90]:
    """Return kornia's rotation by 0, 90, 180 or 270 degrees with equal probability, if a preset has it.

    Args:
        preset: the preset.
    """
    # kornia rounds uniform numbers: -2 and 2, which are the same rotation, have half the probability of the others.
    return [K.RandomRotation90((-2, 2), p=1.0)] if preset.rotate else []


class TrainingPipeline(nn.Module):
    """Augment and normalize a batch of images, and convert its labels to soft labels.

    The operators are kornia's and run on the device of the images, in this order: random resized crop, flip,
    rotation, RandAugment or TrivialAugment, color jitter, normalization, random erasing, mixup or cutmix. RandAugment
    uses kornia's magnitudes for ``n=2, m=9``.

    Args:
        img_size: side of the square output in pixels.
        num_classes: number of classes.
        preset: a name of :data:`TRAINING_PRESETS` or a :class:`TrainingPreset`.
        mean: channel means to subtract, for values in [0, 1].
        std: channel standard deviations to divide by.
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
        """Augment a batch.

        Args:
            images: images :math:`(B, 3, H, W)` in [0, 1].
            labels: class indices :math:`(B,)`.

        Returns:
            Normalized images :math:`(B, 3, S, S)` and soft labels :math:`(B, classes)`, whose rows sum to 1, for
            :func:`torch.nn.functional.cross_entropy`.

        Raises:
            TypeError: if ``images`` is not a floating point tensor.
            ValueError: if a shape is another.
        """
        check_images(images)
        if labels.shape != images.shape[:1]:
            raise ValueError(f"Expected {len(images)} labels, one per image; got the shape {tuple(labels.shape)}.")
        images = self.augment(images)
        first = second = labels
        weight = images.new_zeros(len(labels))  # of the second label
        if len(self.mixers) and len(labels) and torch.rand(()) < self.preset.mix_probability:
            mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
            images, mixed = mixer(images, labels)
            first, second, weight = mixed.view(-1, 3).unbind(1)
            if isinstance(mixer, K.RandomCutMixV2):  # which returns the weight of the first label
                weight = 1 - weight
        targets = torch.lerp(self._one_hot(first), self._one_hot(second), weight.unsqueeze(1).float())
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
        *rotations(preset),
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
    """kornia's mixup with the weights from a Beta distribution instead of a uniform one."""

    def __init__(self, alpha: float) -> None:
        super().__init__(data_keys=["input", "class"])
        self.weights = torch.distributions.Beta(alpha, alpha)

    def forward_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        params = super().forward_parameters(batch_shape)
        params["mixup_lambdas"] = self.weights.sample((batch_shape[0],)).to(params["mixup_lambdas"])
        return params


def check_counts(**numbers: int) -> None:
    """Raise an error for arguments that are not positive integers.

    Args:
        **numbers: arguments by name.

    Raises:
        ValueError: if a number is not an integer from 1 to ``sys.maxsize``.
    """
    for name, number in numbers.items():
        if not is_integer(number, 1) or number > sys.maxsize:
            raise ValueError(f"{name} must be a positive integer; got {number!r}.")


def default_preprocessing(config: TinyViTConfig) -> Preprocessing:
    """Return the preprocessing of weights that store none: ImageNet's statistics at the network's resolution.

    Args:
        config: the configuration of the network.
    """
    return Preprocessing(config.img_size).with_channels(config.in_chans)
