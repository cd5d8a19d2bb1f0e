"""Saliency maps, heatmap overlays and feature maps as images."""

from __future__ import annotations

import math

import torch
from kornia.color import ApplyColorMap, ColorMap
from kornia.enhance import normalize
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn

from kornia_tinyvit.classification import ImageClassifier
from kornia_tinyvit.preprocessing import resize_images

__all__ = ["feature_colors", "kernel_size", "overlay_heatmap", "saliency", "stage_features"]


def saliency(classifier: nn.Module, images: Tensor, classes: Tensor | None = None, blur: float = 0.01) -> Tensor:
    """Return a saliency map: the absolute gradient of a class's logit with respect to the pixels.

    Args:
        classifier: a module from images to logits, such as an :class:`~kornia_tinyvit.ImageClassifier`.
        images: images :math:`(B, C, H, W)` in [0, 1].
        classes: class indices :math:`(B,)`; default the top-1 classes.
        blur: standard deviation of the Gaussian smoothing as a fraction of the image's longer side.

    Returns:
        Saliency maps :math:`(B, 1, H, W)` in [0, 1]: the maximum over the channels, divided by its 99th percentile.

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
    """Return the kernel size of a Gaussian: two standard deviations on each side, odd, at most the image size.

    Args:
        sigma: standard deviation in pixels.
        images: images :math:`(B, C, H, W)`.
    """
    return min(2 * math.ceil(2 * sigma) + 1, *(side - 1 + side % 2 for side in images.shape[-2:]))


def feature_colors(features: Tensor) -> Tensor:
    r"""Return the first three principal components of feature maps as colors.

    Args:
        features: feature maps :math:`(B, C, H, W)` with :math:`C \ge 3`; the components are shared by the batch.

    Returns:
        Images :math:`(B, 3, H, W)` in [0, 1]; the first component is red.
    """
    cells = features.detach().float().movedim(1, -1).flatten(0, 2)
    cells = cells - cells.mean(0)
    _, _, components = torch.linalg.svd(cells, full_matrices=False)
    axes = torch.zeros(3, cells.shape[1], device=cells.device)
    axes[: min(3, len(components))] = components[:3]
    # The sign of a component is arbitrary; a positive largest entry makes it deterministic.
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    colors = cells @ (axes * torch.where(largest < 0, -1.0, 1.0)).T
    colors = colors.unflatten(0, (features.shape[0], *features.shape[2:])).movedim(-1, 1)
    low, high = _percentile(colors, 0.01), _percentile(colors, 0.99)
    return ((colors - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def overlay_heatmap(images: Tensor, heat: Tensor, opacity: float = 0.75) -> Tensor:
    """Draw a heatmap over darkened grayscale images.

    Args:
        images: images :math:`(B, 3, H, W)` in [0, 1].
        heat: heatmaps :math:`(B, 1, H, W)` in [0, 1].
        opacity: opacity of the color where the heat is 1.

    Returns:
        Images :math:`(B, 3, H, W)` in [0, 1].
    """
    colormap = ApplyColorMap(ColorMap("plasma", num_colors=256, device=images.device, dtype=images.dtype))
    gray = images.mean(1, keepdim=True).expand_as(images) * 0.6
    return torch.lerp(gray, colormap(heat), opacity * heat)


def stage_features(classifier: ImageClassifier, images: Tensor) -> list[Tensor]:
    r"""Return the feature maps of the four stages for uncropped images.

    The shorter side is resized to four times the network's resolution, for feature maps of more cells.

    Args:
        classifier: the classifier; its ``model.preprocessing`` gives interpolation, mean and standard deviation.
        images: images :math:`(B, C, H, W)` in [0, 1].

    Returns:
        Feature maps :math:`(B, C_i, H_i, W_i)`, from the highest resolution to the lowest.
    """
    preprocessing = classifier.model.preprocessing
    scale = 4 * preprocessing.img_size / min(images.shape[-2:])
    height, width = (min(round(side * scale), 2048) for side in images.shape[-2:])
    whole = resize_images(images, height, width, preprocessing.interpolation)
    mean, std = images.new_tensor(preprocessing.mean), images.new_tensor(preprocessing.std)
    return classifier.model.forward_intermediates(normalize(whole, mean, std))


def _percentile(values: Tensor, fraction: float) -> Tensor:
    """Return a percentile per image and channel, :math:`(B, C, 1, 1)`."""
    flat = values.flatten(2).sort(2).values
    return flat[..., round(fraction * (flat.shape[2] - 1)), None, None]
