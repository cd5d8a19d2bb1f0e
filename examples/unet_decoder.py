"""Train a U-Net with a TinyViT encoder that is compatible with segmentation_models_pytorch.

    python examples/unet_decoder.py coco128/semantic_segmentation/config.yaml --images 6

`TinyViTEncoder` has the interface of that library's encoders: `forward` returns feature maps of strides 1, 2, 4, ...
32, the first of which is the image, `out_channels` are their channels, and `output_stride` is 32. A TinyViT has no
feature map of stride 2; like that library's Mix Transformers, the encoder returns an empty one. The decoder is that of
U-Net (arXiv:1505.04597). `segmentation_models_pytorch` needs torchvision, which this project does not require; if both
are installed, its decoder can be used:

    decoder = smp.decoders.unet.decoder.UnetDecoder(encoder.out_channels, (64, 48, 32, 24, 16), n_blocks=5)

DATA is a data set of `examples/segment_semantic.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from kornia.enhance import normalize
from torch import Tensor, nn

from kornia_tinyvit import TinyViT
from kornia_tinyvit.data import IGNORED, SegmentationDataset
from kornia_tinyvit.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from kornia_tinyvit.training import SegmentationMetrics
from kornia_tinyvit.training.metrics.semantic import SegmentationScores


class TinyViTEncoder(nn.Module):
    """A TinyViT with the interface of encoders of segmentation_models_pytorch.

    Args:
        backbone: the network; its head is not used.
    """

    output_stride = 32

    def __init__(self, backbone: TinyViT) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_channels = (backbone.config.in_chans, 0, *backbone.feature_channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map normalized images (B, 3, H, W) to (B, C_i, H / s, W / s) for s = 1, 2, ... 32; sizes are rounded up."""
        batch, _, height, width = x.shape
        empty = x.new_empty(batch, 0, (height + 1) // 2, (width + 1) // 2)
        return [x, empty, *self.backbone.forward_intermediates(x)]


class UnetDecoder(nn.Module):
    """Decoder of U-Net.

    Args:
        encoder_channels: channels of the feature maps, the image first.
        decoder_channels: channels after each block, the coarsest first; one less than `encoder_channels`.
    """

    def __init__(self, encoder_channels: Sequence[int], decoder_channels: Sequence[int] = (64, 48, 32, 24, 16)) -> None:
        super().__init__()
        coarsest, *skips = encoder_channels[:0:-1]
        entering = (coarsest, *decoder_channels[:-1])
        joined = (channels + skip for channels, skip in zip(entering, (*skips, 0), strict=True))
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(before, after), conv(after, after))
            for before, after in zip(joined, decoder_channels, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map the encoder's list to (B, C, H, W) at the size of the image."""
        x, *skips = features[:0:-1]
        skips.append(features[0][:, :0])  # no channels, only the size of the image
        for block, skip in zip(self.blocks, skips, strict=True):
            # Sizes are rounded up, so the ratio of two levels is not always 2: interpolate to the size.
            x = block(torch.cat([F.interpolate(x, skip.shape[2:], mode="nearest"), skip], 1))
        return x


class Unet(nn.Module):
    """Encoder, decoder and segmentation head."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, channels: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.segmentation_head = nn.Conv2d(channels, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalized images (B, 3, H, W) to logits (B, K, H, W)."""
        return self.segmentation_head(self.decoder(self.encoder(x)))


def conv(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    )


def load(images: SegmentationDataset, size: int) -> tuple[Tensor, Tensor]:
    """Return all images, normalized, and their masks, resized to squares."""
    photos, masks = [], []
    for photo, mask in images:
        photos.append(F.interpolate(photo[None], (size, size), mode="bilinear", antialias=True))
        masks.append(F.interpolate(mask[None, None].double(), (size, size), mode="nearest")[0].long())
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return normalize(torch.cat(photos).clamp(0, 1), mean, std), torch.cat(masks)


@torch.no_grad()
def evaluate(network: Unet, photos: Tensor, masks: Tensor, classes: int) -> SegmentationScores:
    metrics = SegmentationMetrics(classes)
    for photo, mask in zip(photos.split(1), masks.split(1), strict=True):
        metrics.update(network.eval()(photo).argmax(1), mask)
    return metrics.compute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a YAML file, or a folder with images and masks")
    parser.add_argument("--images", type=int, default=6, help="size of a random training subset with a fixed seed")
    parser.add_argument("--variant", default="1m")
    parser.add_argument("--weights", default="cifar10", help="a name of the catalog, a path or a URL")
    parser.add_argument("--img-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=Path("unet.pt"), help="file for the weights")
    args = parser.parse_args()
    torch.manual_seed(0)

    images = SegmentationDataset.open(args.data, "train")
    classes = len(images.class_names)
    photos, masks = load(images.sample(args.images), args.img_size)
    encoder = TinyViTEncoder(TinyViT.from_config(args.variant, pretrained=args.weights, num_classes=0))
    decoder = UnetDecoder(encoder.out_channels)
    network = Unet(encoder, decoder, 16, classes)
    print(f"out_channels {encoder.out_channels}, output_stride {encoder.output_stride}")
    for channels, features in zip(encoder.out_channels, encoder(photos[:1]), strict=True):
        print(f"  {channels:3} channels: {' x '.join(map(str, features.shape[1:]))}")

    optimizer = torch.optim.AdamW(network.parameters(), args.lr)
    for epoch in range(args.epochs):
        total = 0.0
        for rows in torch.randperm(len(photos)).split(args.batch_size):
            loss = F.cross_entropy(network.train()(photos[rows]), masks[rows], ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += len(rows) * loss.item()
        if epoch in (0, args.epochs - 1):
            print(json.dumps({"epoch": epoch + 1, "loss": round(total / len(photos), 4)}))

    scores = evaluate(network, photos, masks, classes)
    numbers = {"mean_iou": round(scores.mean_iou, 2), "pixel_accuracy": round(scores.pixel_accuracy, 2)}
    print(json.dumps({"images": len(photos), "classes_present": scores.present, **numbers}))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
