"""Use a TinyViT as the backbone of a feature pyramid, at several image sizes.

    python examples/multiscale_features.py [PHOTO] --sizes 64x64 150x200 256x384 --out features

`forward_intermediates` returns the feature map of each stage, and `feature_channels` and `feature_strides` their
channels and strides, here for a feature pyramid (Lin et al., arXiv:1612.03144) with random weights. The script prints
shapes, tests the gradients, and writes a PNG file for each size with the image and the principal components of the
feature maps as colors.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from kornia.geometry.transform import resize
from kornia.image import make_grid
from kornia.io import write_image
from torch import Tensor, nn

from kornia_tinyvit import TinyViT
from kornia_tinyvit.checkpoints.catalog import ASSETS
from kornia_tinyvit.images import read_image
from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from kornia_tinyvit.visualization import feature_colors


class FeaturePyramid(nn.Module):
    """Project feature maps to the same width and add to each the upsampled coarser ones.

    Args:
        in_channels: channels of the feature maps, finest first.
        out_channels: channels of the output feature maps.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 64) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, out_channels, 1) for channels in in_channels)
        self.smooth = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map (B, C_i, H_i, W_i) to (B, out_channels, H_i, W_i), finest first."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        for fine in range(len(levels) - 2, -1, -1):
            # Sizes are rounded up, so the ratio of two levels is not always 2: interpolate to the size.
            levels[fine] = levels[fine] + F.interpolate(levels[fine + 1], levels[fine].shape[-2:], mode="nearest")
        return [smooth(x) for smooth, x in zip(self.smooth, levels, strict=True)]


def parse_size(text: str) -> tuple[int, int]:
    """Parse `HEIGHTxWIDTH`."""
    height, width = (int(side) for side in text.split("x"))
    return height, width


def shape(x: Tensor) -> str:
    return " x ".join(str(side) for side in x.shape[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path, nargs="?", default=ASSETS / "photos" / "chelsea.png")
    parser.add_argument("--sizes", type=parse_size, nargs="+", default=[(64, 64), (150, 200), (256, 384)])
    parser.add_argument("--out", type=Path, default=Path("features"), help="folder for the images")
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--weights", default="cifar10", help="a name of the catalog, a path or a URL")
    parser.add_argument("--channels", type=int, default=64, help="channels of the pyramid")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)

    backbone = TinyViT.from_config(args.variant, pretrained=args.weights, num_classes=0).to(args.device).eval()
    pyramid = FeaturePyramid(backbone.feature_channels, args.channels).to(args.device)
    print(f"feature_channels {backbone.feature_channels}, feature_strides {backbone.feature_strides}")
    photo = read_image(args.photo).unsqueeze(0).to(args.device)
    args.out.mkdir(parents=True, exist_ok=True)

    for height, width in args.sizes:
        image = resize(photo, (height, width), interpolation="bicubic", antialias=True).clamp(0, 1)
        mean, std = (image.new_tensor(values) for values in (IMAGENET_MEAN, IMAGENET_STD))
        features = backbone.forward_intermediates(normalize(image, mean, std))
        levels = pyramid(features)
        print(f"image 3 x {height} x {width}")
        for stride, feature, level in zip(backbone.feature_strides, features, levels, strict=True):
            print(f"  stride {stride:>2}: stage {shape(feature):<15} pyramid {shape(level)}")

        sum(level.square().mean() for level in levels).backward()  # in place of a task's loss
        reached = [parameter.grad is not None for parameter in backbone.layers.parameters()]
        print(f"  gradients reach {sum(reached)} of {len(reached)} parameters of the stages")
        backbone.zero_grad()

        zoom = max(1, 256 // height)
        tiles = [image, *(feature_colors(feature) for feature in features)]
        tiles = [F.interpolate(tile, (zoom * height, zoom * width), mode="nearest") for tile in tiles]
        sheet = make_grid(torch.cat(tiles), n_row=5, padding=6)
        path = args.out / f"features_{height}x{width}.png"
        write_image(path, (sheet * 255).round().byte().cpu())
        print(f"  wrote {path}")


if __name__ == "__main__":
    main()
