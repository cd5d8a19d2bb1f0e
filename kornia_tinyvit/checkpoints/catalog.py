"""Catalog of the published weights and their preprocessing.

Accuracies are those of the paper's model zoo (arXiv:2207.10666) unless ``trained_on`` names this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from kornia.core.download import hf_url
from torch import Tensor

from kornia_tinyvit.config import TinyViTConfig, resolve_window_sizes
from kornia_tinyvit.preprocessing import Preprocessing, default_preprocessing

__all__ = [
    "ASSETS",
    "CATALOG",
    "IMAGENET_22K",
    "PretrainedWeights",
    "default_class_names",
    "default_weights",
    "find_weights",
    "imagenet_1k_in_22k",
    "imagenet_classes",
    "list_pretrained",
]

#: Folder of the package with weights, photos and class names.
ASSETS = Path(str(resources.files("kornia_tinyvit"))) / "assets"
#: Number of classes of the published ImageNet-22k heads.
IMAGENET_22K = 21841
_ZOO = "https://github.com/wkcn/TinyViT-model-zoo/releases/download/checkpoints"
_FINETUNED = "ImageNet-22k distillation, then ImageNet-1k"

_Accuracy = tuple[float, float] | tuple[None, None]  # top-1 and top-5 in percent


@dataclass(frozen=True)
class PretrainedWeights:
    """An entry of the catalog.

    Args:
        variant: variant of the network.
        name: value of ``pretrained``.
        trained_on: training data and labels.
        num_classes: number of classes of the head.
        img_size: side in pixels of the images in the last stage of training.
        urls: URLs of the file in order of preference; empty for weights inside the package.
        fallback: URL of the same weights in timm's layout, used if all ``urls`` fail.
        top1: top-1 accuracy in percent on the test set, if known.
        top5: top-5 accuracy in percent on the test set, if known.
        asset: file name inside the package.
        mobile_sam: whether the file contains a MobileSAM.
        license: license of the weights.
    """

    variant: str
    name: str
    trained_on: str
    num_classes: int = 1000
    img_size: int = 224
    urls: tuple[str, ...] = ()
    fallback: str | None = None
    top1: float | None = None
    top5: float | None = None
    asset: str | None = None
    mobile_sam: bool = False
    license: str = "MIT"

    @property
    def config(self) -> TinyViTConfig:
        """Configuration of the network, with window sizes, resolution and classes of the weights."""
        base = TinyViTConfig.from_variant(self.variant)
        changes: dict[str, object] = {"num_classes": self.num_classes, "img_size": self.img_size}
        if self.mobile_sam:
            return base.replace(**changes, mobile_sam=True)
        if self.img_size != base.img_size:
            # The official configurations for 384 and 512 pixels scale the windows and reduce the stochastic depth.
            changes["window_sizes"] = resolve_window_sizes(base, self.img_size, "scale")
            changes["drop_path_rate"] = min(base.drop_path_rate, 0.1)
        return base.replace(**changes)

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of the images, if the file stores none."""
        return default_preprocessing(self.config)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """ImageNet-1k class names for classifiers of 1000 classes, otherwise ``None``."""
        return None if self.mobile_sam else default_class_names(self.num_classes)

    @property
    def asset_path(self) -> Path | None:
        """Path of the file inside the package, or ``None``."""
        return None if self.asset is None else ASSETS / self.asset


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the names of the 1000 ImageNet-1k classes in the order of the logits."""
    return tuple((ASSETS / "imagenet_1k_classes.txt").read_text(encoding="utf-8").splitlines())


def default_class_names(num_classes: int) -> tuple[str, ...] | None:
    """Return the class names of weights that do not store any: ImageNet-1k for 1000 classes, otherwise ``None``.

    Args:
        num_classes: number of classes of the head.
    """
    return imagenet_classes() if num_classes == 1000 else None


def imagenet_1k_in_22k() -> Tensor:
    """Return the indices of the ImageNet-1k classes among the 21841 classes of ImageNet-22k: :math:`(1000,)`, int64.

    Both are sorted by WordNet ID, as in the published heads. Class 850, teddy bear (n04399382), is missing in
    ImageNet-22k and has index -1. The indices are derived from timm's lists of WordNet IDs and agree with
    ``imagenet_1kto22k.txt`` of the official code (microsoft/Cream).

    Example:
        >>> imagenet_1k_in_22k()[:3]  # tench, goldfish, great white shark
        tensor([359, 368, 460])
    """
    lines = (ASSETS / "imagenet_22k_to_1k.txt").read_text(encoding="utf-8").split()
    return torch.tensor([int(line) for line in lines])


def _published(
    variant: str, name: str, trained_on: str, file: str, timm: str, accuracy: _Accuracy = (None, None), **fields: Any
) -> PretrainedWeights:
    """Return weights of the official model zoo; the copy of timm is the fallback."""
    top1, top5 = accuracy
    urls: tuple[str, ...] = (f"{_ZOO}/{file}.pth",)
    if name != "in1k_scratch":
        urls = (hf_url("tiny_vit", f"{file}.pth"), *urls)  # kornia's mirror
    fallback = hf_url(f"timm/tiny_vit_{variant}_{timm}", "model.safetensors")
    return PretrainedWeights(variant, name, trained_on, urls=urls, fallback=fallback, top1=top1, top5=top5, **fields)


def _family(variant: str, finetuned: _Accuracy, scratch: _Accuracy) -> list[PretrainedWeights]:
    """Return the three sets of weights of a variant at 224 pixels."""
    file, in22k = f"tiny_vit_{variant}", "ImageNet-22k distillation"
    return [
        _published(variant, "in1k", _FINETUNED, f"{file}_22kto1k_distill", "224.dist_in22k_ft_in1k", finetuned),
        _published(variant, "in22k", in22k, f"{file}_22k_distill", "224.dist_in22k", num_classes=21841),
        _published(variant, "in1k_scratch", "ImageNet-1k", f"{file}_1k", "224.in1k", scratch),
    ]


def _larger(img_size: int, accuracy: _Accuracy) -> PretrainedWeights:
    """Return the weights of the 21m variant that were fine-tuned at a higher resolution."""
    trained_on, file = f"{_FINETUNED} up to {img_size} pixels", f"tiny_vit_21m_22kto1k_{img_size}_distill"
    timm = f"{img_size}.dist_in22k_ft_in1k"
    return _published("21m", f"in1k_{img_size}", trained_on, file, timm, accuracy, img_size=img_size)


#: All published weights, in the order of :func:`list_pretrained`.
CATALOG: tuple[PretrainedWeights, ...] = (
    PretrainedWeights(
        variant="1m",
        name="cifar10",
        trained_on="CIFAR-10, by this project",
        num_classes=10,
        img_size=96,
        asset="tiny_vit_1m_cifar10.safetensors",
        license="Apache-2.0",
    ),
    *_family("5m", (80.7, 95.6), (79.1, 94.8)),
    PretrainedWeights(
        variant="5m",
        name="mobile_sam",
        trained_on="SAM ViT-H's embeddings, by MobileSAM",
        img_size=1024,
        urls=(
            hf_url("mobile_sam", "mobile_sam.pt"),
            "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        ),
        mobile_sam=True,
        license="Apache-2.0",
    ),
    *_family("11m", (83.2, 96.5), (81.5, 95.8)),
    *_family("21m", (84.8, 97.3), (83.1, 96.5)),
    _larger(384, (86.2, 97.8)),
    _larger(512, (86.5, 97.9)),
)


def list_pretrained(variant: str | None = None) -> list[PretrainedWeights]:
    """Return the catalog of published weights.

    Args:
        variant: variant of the entries to return; ``None`` for all.

    Example:
        >>> [weights.name for weights in list_pretrained("21m")]
        ['in1k', 'in22k', 'in1k_scratch', 'in1k_384', 'in1k_512']
    """
    return [weights for weights in CATALOG if variant in (None, weights.variant)]


def find_weights(
    variant: str | None, pretrained: bool | str | Path, img_size: int | None = None
) -> PretrainedWeights | None:
    """Return the entry that ``pretrained`` selects, or ``None`` if it is not the name of an entry.

    Args:
        variant: variant of the entry; ``None`` for a name that only one variant has.
        pretrained: name of the entry, or ``True`` for :func:`default_weights`, which needs a variant.
        img_size: side in pixels of the input images, for :func:`default_weights`.
    """
    if pretrained is True:
        return None if variant is None else default_weights(variant, img_size)
    found = [weights for weights in list_pretrained(variant) if weights.name == str(pretrained)]
    return found[0] if len(found) == 1 else None


def default_weights(variant: str, img_size: int | None = None) -> PretrainedWeights:
    """Return the weights that ``pretrained=True`` selects: the best classifier for the resolution.

    Args:
        variant: ``"1m"``, ``"5m"``, ``"11m"`` or ``"21m"``.
        img_size: side in pixels of the input images; from 384 pixels on it selects weights of 21m at 384 or 512.
    """
    entries = list_pretrained(variant)
    fitting = [weights for weights in entries if weights.name.startswith("in1k_") and weights.name[5:].isdigit()]
    fitting = [weights for weights in fitting if img_size is not None and weights.img_size <= img_size]
    return fitting[-1] if fitting else entries[0]
