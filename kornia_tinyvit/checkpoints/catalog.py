"""What is published: where the weights lie, and how to use them right.

The accuracies are those of the paper's model zoo (arXiv:2207.10666); what this project measured itself is marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import torch
from kornia.core.download import hf_url
from torch import Tensor

from kornia_tinyvit.config import TinyViTConfig, resolve_window_sizes
from kornia_tinyvit.preprocessing import Preprocessing, default_preprocessing

__all__ = [
    "ASSETS",
    "CATALOG",
    "PretrainedWeights",
    "default_class_names",
    "default_weights",
    "find_weights",
    "imagenet_1k_in_22k",
    "imagenet_classes",
    "list_pretrained",
]

#: The folder of the package with weights, photos and the names of classes.
ASSETS = Path(str(resources.files("kornia_tinyvit"))) / "assets"
_ZOO = "https://github.com/wkcn/TinyViT-model-zoo/releases/download/checkpoints"


@dataclass(frozen=True)
class PretrainedWeights:
    """One published set of weights.

    Args:
        variant: the network it belongs to.
        name: what to pass as ``pretrained``.
        trained_on: data and labels it learned from.
        num_classes: classes of its head.
        img_size: side in pixels of the images it was trained on last.
        urls: where the file lies, best first; empty for weights that come with the package.
        fallback: the same weights in timm's layout, tried when none of ``urls`` answers.
        top1: top-1 accuracy in per cent on the classes' test images, where known.
        top5: top-5 accuracy in per cent, likewise.
        asset: file name inside the package.
        mobile_sam: the file holds MobileSAM's image encoder.
        license: license of the weights.
    """

    variant: str
    name: str
    trained_on: str
    num_classes: int
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
        """The network the weights were made for: its windows, resolution and classes."""
        base = TinyViTConfig.from_variant(self.variant)
        changes: dict[str, object] = {"num_classes": self.num_classes, "img_size": self.img_size}
        if self.mobile_sam:
            return base.replace(**changes, mobile_sam=True)
        if self.img_size != base.img_size:
            # The official configurations for 384 and 512 pixels scale the windows and lower the stochastic depth.
            changes["window_sizes"] = resolve_window_sizes(base, self.img_size, "scale")
            changes["drop_path_rate"] = min(base.drop_path_rate, 0.1)
        return base.replace(**changes)

    @property
    def preprocessing(self) -> Preprocessing:
        """What images go through before the network."""
        return default_preprocessing(self.config)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where the package has them and the file itself does not."""
        return None if self.mobile_sam else default_class_names(self.num_classes)

    @property
    def asset_path(self) -> Path | None:
        """The file inside the package, for weights that come with it."""
        return None if self.asset is None else ASSETS / self.asset


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Return the names of the 1000 classes of ImageNet-1k, in the order of the logits."""
    return tuple((ASSETS / "imagenet_1k_classes.txt").read_text(encoding="utf-8").splitlines())


def default_class_names(num_classes: int) -> tuple[str, ...] | None:
    """Return ImageNet-1k's names for weights of 1000 classes without names, which are always that."""
    return imagenet_classes() if num_classes == 1000 else None


def imagenet_1k_in_22k() -> Tensor:
    """Return where the classes of ImageNet-1k stand among the 21841 of ImageNet-22k: :math:`(1000,)`, int64.

    Both lists are sorted by WordNet's identifiers, as the published heads are. Class 850, the teddy bear (n04399382),
    is not in ImageNet-22k and has -1. The positions follow from timm's lists of the identifiers and agree with
    ``imagenet_1kto22k.txt`` of the originals (microsoft/Cream).

    Example:
        >>> imagenet_1k_in_22k()[:3]  # tench, goldfish, great white shark
        tensor([359, 368, 460])
    """
    lines = (ASSETS / "imagenet_22k_to_1k.txt").read_text(encoding="utf-8").split()
    return torch.tensor([int(line) for line in lines])


def _published(
    variant: str,
    name: str,
    file: str,
    trained_on: str,
    accuracy: tuple[float, float] | None,
    timm: str,
    *,
    num_classes: int = 1000,
    img_size: int = 224,
    mirrored: bool = True,
) -> PretrainedWeights:
    mirror = (hf_url("tiny_vit", f"{file}.pth"),) if mirrored else ()
    return PretrainedWeights(
        variant=variant,
        name=name,
        trained_on=trained_on,
        num_classes=num_classes,
        img_size=img_size,
        urls=(*mirror, f"{_ZOO}/{file}.pth"),
        fallback=hf_url(f"timm/tiny_vit_{variant}_{timm}", "model.safetensors"),
        top1=accuracy[0] if accuracy else None,
        top5=accuracy[1] if accuracy else None,
    )


def _family(variant: str, distilled: tuple[float, float], scratch: tuple[float, float]) -> list[PretrainedWeights]:
    """Return the three sets of weights that every published variant has at 224 pixels."""
    file = f"tiny_vit_{variant}"
    distilled_data = "ImageNet-22k distillation, then ImageNet-1k"
    return [
        _published(variant, "in1k", f"{file}_22kto1k_distill", distilled_data, distilled, "224.dist_in22k_ft_in1k"),
        _published(
            variant,
            "in22k",
            f"{file}_22k_distill",
            "ImageNet-22k distillation",
            None,
            "224.dist_in22k",
            num_classes=21841,
        ),
        _published(variant, "in1k_scratch", f"{file}_1k", "ImageNet-1k", scratch, "224.in1k", mirrored=False),
    ]


def _larger(img_size: int, accuracy: tuple[float, float]) -> PretrainedWeights:
    return _published(
        "21m",
        f"in1k_{img_size}",
        f"tiny_vit_21m_22kto1k_{img_size}_distill",
        f"ImageNet-22k distillation, then ImageNet-1k up to {img_size} pixels",
        accuracy,
        f"{img_size}.dist_in22k_ft_in1k",
        img_size=img_size,
    )


#: What is published, in the order in which it is told.
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
        num_classes=1000,
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
        variant: only those of one variant.

    Example:
        >>> [weights.name for weights in list_pretrained("21m")]
        ['in1k', 'in22k', 'in1k_scratch', 'in1k_384', 'in1k_512']
    """
    return [weights for weights in CATALOG if variant in (None, weights.variant)]


def find_weights(variant: str | None, name: str) -> PretrainedWeights | None:
    """Return the entry of a variant by its name; without a variant, by a name that only one variant has."""
    found = [weights for weights in list_pretrained(variant) if weights.name == name]
    return found[0] if len(found) == 1 else None


def default_weights(variant: str, img_size: int | None = None) -> PretrainedWeights:
    """Return what ``pretrained=True`` means: the best classifier for the resolution.

    Args:
        variant: a named variant.
        img_size: side in pixels of the images to come; at 384 and 512 there is a 21m made for them.
    """
    entries = list_pretrained(variant)
    fitting = [weights for weights in entries if weights.name.startswith("in1k_") and weights.name[5:].isdigit()]
    fitting = [weights for weights in fitting if img_size is not None and weights.img_size <= img_size]
    return fitting[-1] if fitting else entries[0]
