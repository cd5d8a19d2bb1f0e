"""What a network sees, as images: saliency, heat over a photo, and the features of its stages."""

from __future__ import annotations

import math

import torch
from kornia.color import ApplyColorMap, ColorMap
from kornia.enhance import normalize
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn

from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.preprocessing import resize_images

__all__ = [
    "feature_colors",
    "kernel_size",
    "overlay_heatmap",
    "saliency",
    "stage_features",
]


def saliency(classifier: nn.Module, images: Tensor, classes: Tensor | None = None, blur: float = 0.01) -> Tensor:
    """Return how strongly each pixel moves a class: the gradient of its logit with respect to the pixels.

    Args:
        classifier: maps images to logits, such as an :class:`~kornia_tinyvit.ImageClassifier`.
        images: images :math:`(B, C, H, W)` in [0, 1].
        classes: class indices :math:`(B,)`; the most likely ones if left out.
        blur: deviation of the Gaussian that smooths the map, as a share of the image's longer side.

    Returns:
        Maps :math:`(B, 1, H, W)` in [0, 1], the largest over the channels, each scaled by its 99th percentile.

    Example:
        >>> classifier = ImageClassifier.from_config("1m", pretrained="cifar10")
        >>> saliency(classifier, torch.rand(1, 3, 48, 64)).shape
        torch.Size([1, 1, 48, 64])
    """
    pixels = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = classifier(pixels)
        if classes is None:
            classes = logits.argmax(1)
        (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), pixels)
    heat = gradient.abs().amax(1, keepdim=True)
    sigma = max(0.5, blur * max(images.shape[-2:]))
    heat = gaussian_blur2d(heat, kernel_size(sigma, images), (sigma, sigma))
    return (heat / _percentile(heat, 0.99).clamp_min(1e-12)).clamp(0, 1)


def kernel_size(sigma: float, images: Tensor) -> int:
    """Return the side of a Gaussian's kernel: two deviations to each side, odd, and no larger than the images.

    Args:
        sigma: standard deviation in pixels.
        images: images :math:`(B, C, H, W)`.
    """
    return min(2 * math.ceil(2 * sigma) + 1, *(side - 1 + side % 2 for side in images.shape[-2:]))


def feature_colors(features: Tensor) -> Tensor:
    r"""Show maps of many channels as color: their first three principal components over all their cells.

    Args:
        features: maps :math:`(B, C, H, W)` with :math:`C \ge 3`; the components are shared by the batch.

    Returns:
        Images :math:`(B, 3, H, W)` in [0, 1]; the strongest component is red.
    """
    cells = features.detach().float().movedim(1, -1).flatten(0, 2)
    cells = cells - cells.mean(0)
    _, _, components = torch.linalg.svd(cells, full_matrices=False)
    axes = torch.zeros(3, cells.shape[1], device=cells.device)
    axes[: min(3, len(components))] = components[:3]
    # The sign of a component is arbitrary: the largest entry is made positive, so that an image repeats.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    colors = cells @ (axes * torch.where(largest < 0, -1.0, 1.0)).T
    colors = colors.unflatten(0, (features.shape[0], *features.shape[2:])).movedim(-1, 1)
    low, high = _percentile(colors, 0.01), _percentile(colors, 0.99)
    return ((colors - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def overlay_heatmap(images: Tensor, heat: Tensor, opacity: float = 0.75) -> Tensor:
    """Lay a heat map over dimmed gray images.

    Args:
        images: images :math:`(B, 3, H, W)` in [0, 1].
        heat: maps :math:`(B, 1, H, W)` in [0, 1].
        opacity: share of the color where the heat is highest.

    Returns:
        Images :math:`(B, 3, H, W)` in [0, 1].
    """
    colormap = ApplyColorMap(ColorMap("plasma", num_colors=256, device=images.device, dtype=images.dtype))
    gray = images.mean(1, keepdim=True).expand_as(images) * 0.6
    return torch.lerp(gray, colormap(heat), opacity * heat)


def stage_features(classifier: ImageClassifier, images: Tensor) -> list[Tensor]:
    r"""Return the maps of the four stages for whole images, their shorter side at four times the resolution.

    That shows more than the few cells that the classifier itself looks at.

    Args:
        classifier: the network to look into; images are resized and normalized as its ``model.preprocessing`` says.
        images: images :math:`(B, C, H, W)` in [0, 1].

    Returns:
        Maps :math:`(B, C_i, H_i, W_i)`, the finest first.
    """
    preprocessing = classifier.model.preprocessing
    scale = 4 * preprocessing.img_size / min(images.shape[-2:])
    height, width = (min(round(side * scale), 2048) for side in images.shape[-2:])
    whole = resize_images(images, height, width, preprocessing.interpolation)
    mean, std = images.new_tensor(preprocessing.mean), images.new_tensor(preprocessing.std)
    return classifier.model.forward_intermediates(normalize(whole, mean, std))


def _percentile(values: Tensor, share: float) -> Tensor:
    """Return the percentile of each image's channel, shaped to broadcast over it."""
    flat = values.flatten(2).sort(2).values
    return flat[..., round(share * (flat.shape[2] - 1)), None, None]
